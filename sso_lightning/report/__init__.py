"""One HTML page that shows what a run did, and alarms for signals that die.

A side room: it reads run folders and nothing in the library needs it.
"""

from sso_lightning.report.health import Bounds, alarms, readings
from sso_lightning.report.read import read_runs

__all__ = ["Bounds", "alarms", "read_runs", "readings"]
