"""Tables, sweeps, plots and the HTML report."""
