"""Methods are found by name, completed with their defaults, and refused with the way out."""

import inspect
import sys
from importlib.metadata import EntryPoint

import pytest

import optimizers
from optimizers import registry
from optimizers.contract import build_model


@pytest.mark.parametrize("name", optimizers.available())
def test_a_method_resolves_to_all_its_hyperparameters_and_is_built_from_them(name):
    values = optimizers.resolve(name, lr=0.5)
    keywords = list(inspect.signature(optimizers.get(name)).parameters)[1:]
    assert list(values) == keywords and values["lr"] == 0.5
    assert optimizers.create(name, build_model(), **values).param_groups[0]["lr"] == 0.5


def test_an_unknown_method_gets_the_nearest_name_and_the_list():
    with pytest.raises(ValueError, match=r"unknown method 'badm'\. Did you mean 'badam'\? Available: .*adamw"):
        optimizers.get("badm")


def test_an_unknown_keyword_gets_the_nearest_name_and_the_list():
    with pytest.raises(ValueError, match=r"badam has no hyper-parameter 'swich_every'\. Did you mean 'switch_every'\?"):
        optimizers.resolve("badam", swich_every=3)


def test_a_users_own_class_is_found_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "own_method.py").write_text("import optimizers\nclass Mine(optimizers.SGD): pass\nother = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert optimizers.get("own_method:Mine") is sys.modules["own_method"].Mine
    with pytest.raises(ValueError, match="has no 'Yours'"):
        optimizers.get("own_method:Yours")
    with pytest.raises(ValueError, match="must be a subclass"):
        optimizers.get("own_method:other")
    with pytest.raises(ValueError, match="importable"):
        optimizers.get("no_such_module:Mine")


def test_an_installed_package_adds_methods_through_its_entry_point(monkeypatch):
    point = EntryPoint("theirs", "optimizers:SGD", registry.ENTRY_POINTS)
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    assert "theirs" in optimizers.available()
    assert optimizers.get("theirs") is optimizers.SGD


class Extended(optimizers.SGD):
    """SGD with a keyword that came after records were made with it."""

    added_later = ("rounding",)

    def __init__(self, model, lr=0.1, *, rounding="nearest"):
        super().__init__(model, lr)


def test_a_keyword_added_later_is_in_use_where_it_is_not_at_its_default(monkeypatch):
    monkeypatch.setitem(registry._METHODS, "extended", Extended)
    assert optimizers.in_use("extended", optimizers.resolve("extended")) == {"lr": 0.1}
    given = optimizers.resolve("extended", rounding="stochastic")
    assert optimizers.in_use("extended", given) == {"lr": 0.1, "rounding": "stochastic"}


def test_all_stands_for_every_registered_method_wherever_it_is_named():
    names = optimizers.expand(["badam", "all", "torch.optim:SGD"])
    assert names[0] == "badam" and names[-1] == "torch.optim:SGD"
    assert sorted(names[:-1]) == sorted(optimizers.available())
