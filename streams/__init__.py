"""Non-stationary data streams: pure functions of (key, client, round).

A `Stream` says which rows each client sees at each round. It is made from a table of
rows (`arrays`, `digits`, `idx`, `npz`, `tfds_arrays`), a `Partition` of the rows over
clients, and a `Schedule`, the array pi[round, client, context] that is the drift.
"""

if __name__ != "fedcl.streams":
    raise ImportError(
        "import `fedcl.streams`, not `streams`: the repository root is on sys.path"
    )

from fedcl.streams._arrival import arrival as arrival
from fedcl.streams._build import class_incremental as class_incremental
from fedcl.streams._build import contexts_of as contexts_of
from fedcl.streams._build import domain_incremental as domain_incremental
from fedcl.streams._build import from_arrays as from_arrays
from fedcl.streams._build import held_out as held_out
from fedcl.streams._build import task_incremental as task_incremental
from fedcl.streams._combine import concatenated as concatenated
from fedcl.streams._combine import lagged as lagged
from fedcl.streams._combine import mixed as mixed
from fedcl.streams._domains import Domains as Domains
from fedcl.streams._domains import permutations as permutations
from fedcl.streams._domains import rotations as rotations
from fedcl.streams._domains import transforms as transforms
from fedcl.streams._grouping import Grouping as Grouping
from fedcl.streams._grouping import by as by
from fedcl.streams._grouping import clusters as clusters
from fedcl.streams._grouping import eras as eras
from fedcl.streams._grouping import times as times
from fedcl.streams._hosted import Hosted as Hosted
from fedcl.streams._hosted import hosted as hosted
from fedcl.streams._mnist360 import mnist_360 as mnist_360
from fedcl.streams._mnist360 import mnist_360_test as mnist_360_test
from fedcl.streams._packed import Packed as Packed
from fedcl.streams._packed import held_out_text as held_out_text
from fedcl.streams._packed import packed as packed
from fedcl.streams._partitions import Partition as Partition
from fedcl.streams._partitions import dirichlet as dirichlet
from fedcl.streams._partitions import iid as iid
from fedcl.streams._partitions import natural as natural
from fedcl.streams._partitions import quantity as quantity
from fedcl.streams._partitions import shards as shards
from fedcl.streams._picture import draw as draw
from fedcl.streams._schedules import Schedule as Schedule
from fedcl.streams._schedules import abrupt as abrupt
from fedcl.streams._schedules import blurry as blurry
from fedcl.streams._schedules import gradual as gradual
from fedcl.streams._schedules import join_leave as join_leave
from fedcl.streams._schedules import label_drift as label_drift
from fedcl.streams._schedules import recurring as recurring
from fedcl.streams._schedules import staggered as staggered
from fedcl.streams._sources import arrays as arrays
from fedcl.streams._sources import digits as digits
from fedcl.streams._sources import idx as idx
from fedcl.streams._sources import mnist as mnist
from fedcl.streams._sources import npz as npz
from fedcl.streams._sources import split as split
from fedcl.streams._stream import Stream as Stream
from fedcl.streams._text import Corpus as Corpus
from fedcl.streams._text import text as text
from fedcl.streams._tfds import tfds_arrays as tfds_arrays
from fedcl.streams._tfds import tfds_source as tfds_source
from fedcl.streams._tokens import Tokens as Tokens
from fedcl.streams._tokens import tokenised as tokenised
from fedcl.streams._validation import validation as validation
