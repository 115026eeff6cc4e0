"""The words that say where an intervention acts, on which tokens and by which rule; `Intervention` explains them."""

SITES = ("heads", "residual", "mlp")
POSITIONS = ("last", "generated", "all")
OPERATIONS = ("add", "icv")
