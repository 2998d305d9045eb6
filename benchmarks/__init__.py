"""Each benchmark runs us and the rival on the same work in one run, prints a ratio, and writes its JSON here."""
