"""From the configuration to objects: the only package that imports configs, models and the other packages of utils.

train.py calls each builder once, in a fixed order.
"""

from .data import Data, NamedSplit, build_data, build_eval_loader, print_compile_time
from .find import Found, SavedRun, decide_resume, find, machine, saved_run
from .leakage import chosen_on
from .model import Built, build_model
from .opened import Opened, open_model, title_of_run
from .run import build_run, check_same_data, open_outputs, print_resume
from .trainer import build_trainer
