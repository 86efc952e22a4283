"""A client: its id is its node's partition-id, its state lies in its node's directory.

The nodes of a simulation have none: theirs is the environment's DIGITS_STATES.
"""

import os

from digits.task import federation
from fedcl import flower

states = os.environ.get("DIGITS_STATES")
app = flower.client_app(lambda context: federation(), directory=states)
