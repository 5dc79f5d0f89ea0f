"""Real text, packed once, read deterministically. `idlm pack --help` explains the folder."""

from train.data.build import build_dataset as build_dataset
from train.data.pipeline import check_vocabulary as check_vocabulary
from train.data.pipeline import heldout_batches as heldout_batches
from train.data.pipeline import heldout_prompts as heldout_prompts
from train.data.pipeline import make_train_iterator as make_train_iterator
from train.data.settings import DatasetReport as DatasetReport
from train.data.settings import DatasetSettings as DatasetSettings
from train.data.settings import SplitReport as SplitReport
from train.data.settings import read_report as read_report
