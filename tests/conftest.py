"""What all tests share: one thread (the suite runs one process a core), no network, and the folder of real data."""

import gc
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start too
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests are a CPU's, wherever they run

import pytest
import torch

torch.set_num_threads(1)
# At its first backward pass autograd starts a thread for each device, also for one that fake tensors pretend to have in
# a CUDA build of torch; from then on nothing that is forked could compute gradients.
torch.ones((), requires_grad=True).backward()
gc.disable()  # until all tests are imported: what is imported isn't garbage

ROOT = Path(__file__).resolve().parent.parent


# Those that take longest begin first, so that no process works alone at the end.
LONGEST = ("contract", "api", "resume", "cli", "runner", "study", "workflow", "docs", "gpu_bench", "architectures")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests share a process, and with it what its fixtures have made, unless something else is asked for."""
    if config.option.dist != "load":
        return None
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False
    return LoadFileScheduling(config, log)


def pytest_collection_finish():
    gc.enable()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def quick_collections():
    """What was imported needn't be looked through each time that the code under test collects garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets beside the checkout; tests that read it skip where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder of real data beside the checkout")
    return folder


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    """A tab of a headless Chromium."""
    import browser

    tab = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()
