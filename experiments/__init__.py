"""Make and draw the stored results in docs/results; part of a source checkout, not of the installed package."""
