"""Tests of tables, plots and the report."""
