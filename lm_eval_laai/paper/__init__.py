"""`laai paper`: the paper's tables and figures as cells of experiments, and the report of them."""
