"""Work on a Ray cluster: a pool of workers that come and go with its nodes, and a map over them that loses no item.

The one room that imports ray, an extra, and only when it is asked to. Extraction, its scan, a study and a prediction
are uses of it: the driver keeps what is to be done and what is found, workers keep nothing, so any of them may die at
any moment. Open `pool.py` first; `tasks.py` decides what becomes of an item whose worker died, `seat.py` is what a
worker's process runs, and `connection.py` joins a cluster, or starts one in a `folder.py`. May import: nothing.
"""

from pipeline.cluster.connection import LOCAL, Cluster, Need, connected
from pipeline.cluster.pool import Pool, Share, hired
from pipeline.cluster.tasks import Done, Lost

__all__ = ["LOCAL", "Cluster", "Done", "Lost", "Need", "Pool", "Share", "connected", "hired"]
