"""The words that say where an intervention acts, on which tokens and by which rule; `Intervention` explains them."""

from typing import Literal, get_args

Site = Literal["heads", "residual", "mlp"]
SITES: tuple[Site, ...] = get_args(Site)
POSITIONS = ("last", "generated", "all")
OPERATIONS = ("add", "icv")
