import pytest

from archzoo.training.config import ConfigError, asdict_plain, from_plain, identity, run_id, validate
from tests.training.support import make_config


def test_a_sound_config_passes():
    validate(make_config())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"lr": -1.0}}, "optimizer.lr=-1: must be a positive number"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr=nan"),
        ({"optimizer": {"momentum": 1.0}}, "optimizer.momentum=1"),
        ({"seed": -3}, "seed=-3"),
        ({"trainer": {"steps": 0}}, "trainer.steps=0"),
        ({"trainer": {"epochs": 3}}, "exactly one must be set, got trainer.steps=12, trainer.epochs=3"),
        ({"trainer": {"steps": None}}, "exactly one must be set, got none of them"),
        ({"trainer": {"batch_size": 0}}, "trainer.batch_size=0"),
        ({"trainer": {"precision": "float31"}}, "did you mean 'float32'"),
        ({"trainer": {"ema_decay": 1.5}}, "trainer.ema_decay=1.5"),
        ({"trainer": {"device": "gpu"}}, "trainer.device=gpu"),
        ({"optimizer": {"name": "lbfgs", "weight_decay": 0.1}}, "optimizer.weight_decay=0.1: optimizer lbfgs has none"),
        ({"optimizer": {"name": "lbfgs"}, "trainer": {"clip_grad": 1.0}}, "set trainer.clip_grad=null"),
        ({"optimizer": {"name": "lbfgs"}, "trainer": {"accumulate": 4}}, "trainer.accumulate=1 trainer.batch_size=64"),
        ({"optimizer": {"name": "lbfgs"}, "trainer": {"precision": "float16"}}, "trainer.precision=float16: its loss"),
        ({"scheduler": {"name": "cosin"}}, "did you mean 'cosine'"),
        ({"scheduler": {"warmup": 5.0}}, "scheduler.warmup=5"),
        ({"budget": {"match": "parms"}}, "did you mean 'params'"),
        ({"budget": {"to": -5}}, "budget.to=-5"),
        ({"tracker": {"wandb": "offlin"}}, "did you mean 'offline'"),
        ({"layer": {}}, "layer.name: missing"),
        ({"name": "a/b"}, "name='a/b'"),
        ({"sweep": {"tune": ["optimizer.lrr"]}}, "sweep.tune=optimizer.lrr: there is no such key; did you mean"),
        ({"sweep": {"tune": ["lr"]}}, "sweep.tune=lr: there is no such key; choose one of optimizer.lr"),
        ({"sweep": {"tune": ["optimizer"]}}, "sweep.tune=optimizer: is a group of keys; did you mean 'optimizer."),
        ({"sweep": {"tune": ["optimizer.lr", "seed"]}}, "sweep.tune=seed: must be a setting that decides"),
        ({"sweep": {"tune": ["trainer.threads"]}}, "sweep.tune=trainer.threads: must be a setting that decides"),
        ({"sweep": {"tune": ["task.name"]}}, "sweep.tune=task.name: must be a setting"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(changes, words):
    with pytest.raises(ConfigError, match=".") as error:
        validate(make_config(**changes))
    assert words in str(error.value)


def test_all_wrong_values_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        validate(make_config(optimizer={"lr": 0.0}, trainer={"batch_size": -1}, budget={"match": "x"}))
    assert len(str(error.value).splitlines()) == 3


@pytest.mark.parametrize(
    "changes",
    [{"name": "other"}, {"output_dir": "elsewhere"}, {"data_dir": "x"}, {"tracker": {"tensorboard": True}}]
    + [{"sweep": {"tune": ["optimizer.lr"]}}]
    + [{"trainer": {key: 3}} for key in ("threads", "workers", "log_every", "checkpoint_every", "keep_checkpoints")],
)
def test_a_runs_id_ignores_paths_logging_and_devices(changes):
    assert run_id(asdict_plain(make_config(**changes))) == run_id(asdict_plain(make_config()))


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"layer": {"name": "kan"}}, {"optimizer": {"lr": 0.5}}, {"trainer": {"steps": 13}}]
    + [{"trainer": {"deterministic": True}}, {"budget": {"match": "flops"}}, {"callbacks": {"grid_update": {}}}],
)
def test_a_runs_id_tells_different_results_apart(changes):
    assert run_id(asdict_plain(make_config(**changes))) != run_id(asdict_plain(make_config()))


def test_a_recorded_config_is_read_back():
    config = make_config(optimizer={"name": "lbfgs", "options": {"max_iter": 3}}, callbacks={"grid_update": {}})
    assert from_plain(asdict_plain(config)) == config


def test_what_is_tuned_is_recorded_and_a_record_from_before_is_read():
    config = make_config(sweep={"tune": ["optimizer.lr", "layer.bias"]}, layer={"name": "linear", "bias": True})
    validate(config)
    plain = asdict_plain(config)
    assert plain["sweep"]["tune"] == ["optimizer.lr", "layer.bias"]
    assert from_plain(plain) == config
    del plain["sweep"]["tune"]
    assert from_plain(plain).sweep.tune == []


def test_identity_keeps_what_counts():
    kept = identity(asdict_plain(make_config()))
    assert {"task", "model", "layer", "seed", "optimizer", "scheduler", "trainer", "budget", "callbacks"} == kept.keys()
