"""The first configuration for somebody's own data: look at them, choose what fits them and this machine, write it.

`proposal.py` is the whole way; what a source is, is found out in `source.py`, and what suits it chosen in `method.py`.
"""

from pipeline.stages.first_config.draft import Ask, Given, silent
from pipeline.stages.first_config.proposal import propose

__all__ = ["Ask", "Given", "propose", "silent"]
