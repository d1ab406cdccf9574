"""Ready-made recipes, one for each kind of data of the report (section 4.1): docs/synthesis.md."""
