"""Reward models: the head against `transformers`' hidden states, the published loss, a run, its files and its ranks."""

import dataclasses
import io
import json
import re
import shutil

import jax
import jax.numpy as jnp
import mpmath
import naive
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from etils import epath
from quick import quick_jit
from torch_llava import params_of, tiny_config, torch_llava

from napo_jax import answer_scores, build_ranked, building, evaluation, export, load_pretrained, methods, tensor_files
from napo_jax import train as training
from napo_jax.build_ranked import Options, build
from napo_jax.command import exit_with_one_line
from napo_jax.config import ModelConfig, load_config
from napo_jax.data.dataset import open_dataset
from napo_jax.journal import StoppedError
from napo_jax.logps import DetailedLogps, Logps
from napo_jax.losses import dpo_loss, reward_loss
from napo_jax.metrics import Console
from napo_jax.model_source import Run, find_model, load_trained
from napo_jax.models import IMAGE_SLOT, Groups, Llava, Packing
from napo_jax.models.lora import LoraConfig
from napo_jax.objective import Objective
from napo_jax.optim import OptimizerConfig, flatten, make_optimizer, split_trained
from napo_jax.score import score
from napo_jax.sharding import MeshConfig, make_mesh
from napo_jax.speaker import load_speaker
from napo_jax.start import load_parts, make_model
from napo_jax.step import Frozen, init_state, make_train_step
from napo_jax.term import Term
from napo_jax.world.configs import cure
from napo_jax.world.records import write_pairs

STEPS, SAVED = 20, 16
QUICK_REWARDS = quick_jit(answer_scores._rewards.__wrapped__, static_argnums=0)

# --- the loss


def test_the_mean_of_the_losses_is_the_published_loss():
    """BCE of the difference, and c times the size of the mean of the sums: value and gradient, whatever its sign."""
    chosen, rejected = np.float32(np.random.default_rng(0).normal(1.0, 2.0, (2, 8)))
    for sign in (1, -1):
        pair = chosen * sign, rejected * sign
        mean = lambda *pair: jnp.mean(reward_loss(*pair, centring_weight=0.3)[0])
        published = lambda c, r: jnp.mean(-jax.nn.log_sigmoid(c - r)) + 0.3 * jnp.abs(jnp.mean(r + c))
        (got, slopes), (want, wanted) = (jax.value_and_grad(f, argnums=(0, 1))(*pair) for f in (mean, published))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        np.testing.assert_allclose(slopes, wanted, rtol=1e-5, atol=1e-7)
        uncentred, squared = (
            jax.grad(lambda c, r=pair[1], o=o: jnp.mean(reward_loss(c, r, **o)[0]))(pair[0])
            for o in ({"centring_weight": 0.0}, {"centring_weight": 0.3, "centring": "square"})
        )
        assert not np.allclose(uncentred, wanted[0], atol=1e-3)
        assert not np.allclose(squared, wanted[0], atol=1e-3)


def test_the_loss_in_sixty_digits():
    """Far out, where exp under- and overflows in float32, and by hand at two points."""
    with mpmath.workdps(60):
        for chosen, rejected in ((200.0, -3.5), (-200.0, 3.5), (0.25, 0.0), (40.0, 39.0)):
            want = mpmath.log(1 + mpmath.exp(mpmath.mpf(rejected) - chosen)) + mpmath.mpf("0.001") * abs(
                mpmath.mpf(chosen) + rejected
            )
            (got,), _ = reward_loss(jnp.float32([chosen]), jnp.float32([rejected]))
            assert got == pytest.approx(float(want), rel=1e-6)
    values, stats = reward_loss(jnp.float32([2, 0]), jnp.float32([1, -1]), centring_weight=0.1, centring="square")
    np.testing.assert_allclose(values, [0.3132617 + 0.9, 0.3132617 + 0.1], rtol=1e-6)
    np.testing.assert_allclose(stats["mean_rewards"], [1.5, -0.5])


def test_the_sign_is_that_of_the_whole_batch():
    """Half of the rows have a positive sum on their own; on all devices together it is negative."""
    chosen, rejected = np.float32([1, 2, -5, -6]), np.float32([0, 1, -4, -7])
    want, _ = reward_loss(chosen, rejected, centring_weight=0.5)
    halves = lambda x: x.reshape(2, 2)
    run = lambda c, r: reward_loss(c, r, centring_weight=0.5, axis_name="rows")[0]
    got = jax.vmap(run, axis_name="rows")(halves(chosen), halves(rejected))
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-6)
    np.testing.assert_allclose(want, naive.reward(chosen, rejected, 0.5, "absolute"), rtol=1e-6)
    with pytest.raises(ValueError, match="centring must be one of"):
        reward_loss(chosen, rejected, centring="none")
    with pytest.raises(ValueError, match="centring_weight must be 0 or more"):
        reward_loss(chosen, rejected, centring_weight=-1.0)


# --- the objective


def rewards_of(**cells):
    return {cell: DetailedLogps(None, None, reward=jnp.float32(values)) for cell, values in cells.items()}


def test_an_objective_of_rewards_reads_nothing_else():
    objective = methods.reward()
    assert (objective.needs_logps, objective.needs_rewards, objective.reference_cells) == (False, True, ())
    assert objective.columns() == ["reward"]
    policy = rewards_of(chosen=[3, 1, 9], rejected=[1, 2, 0])
    where = {cell: jnp.array([True, True, False]) for cell in policy}
    loss, metrics = objective(policy, where=where)
    np.testing.assert_allclose(metrics["preference/margin"], (2 - 1) / 2)
    np.testing.assert_allclose(metrics["preference/accuracy"], 0.5)
    np.testing.assert_allclose(metrics["preference/mean_reward"], (2 + 1.5) / 2)
    np.testing.assert_allclose(metrics["preference/chosen_reward"], 2)
    np.testing.assert_allclose(loss, (np.log1p(np.exp(-2)) + np.log1p(np.exp(1))) / 2 + 1e-3 * 3.5, rtol=1e-6)
    with pytest.raises(ValueError, match="reads what a reward head gives the answers, and no reward is given"):
        objective(dict.fromkeys(policy, Logps(jnp.zeros(3), jnp.zeros(3))))
    with pytest.raises(ValueError, match="edited weighs log-probs"):
        Term("reward", reward_loss, "chosen", "rejected", edited=1.0)
    with pytest.raises(ValueError, match="takes another cell"):
        Term("reward", reward_loss, "chosen")


def test_rewards_and_log_probs_may_stand_in_one_objective():
    both = Objective((Term("dpo", dpo_loss, "chosen", "rejected"), *methods.reward().terms))
    assert (both.needs_logps, both.reference_cells) == (True, ("chosen", "rejected"))
    assert both.columns() == ["sum", "mean", "reward"]
    assert both.columns(reference=True) == ["sum", "mean"]
    assert evaluation.with_ablation(both).terms[-1].needs_logps
    assert evaluation.with_ablation(methods.reward()).terms[-1].needs_rewards


def test_the_head_always_trains():
    leaves = dict.fromkeys(["language/head", "language/norm/scale", "reward/kernel", "reward/bias"])
    trained, frozen = split_trained(leaves, OptimizerConfig())
    assert sorted(frozen) == ["language/head"], "the vocabulary has no part in it"
    adapted = leaves | dict.fromkeys([f"language/layers/mlp/up/{name}" for name in ("kernel", "lora_a", "lora_b")])
    trained, _ = split_trained(adapted, OptimizerConfig())
    assert sorted(path.rpartition("/")[2] for path in trained) == ["bias", "kernel", "lora_a", "lora_b"]
    with pytest.raises(ValueError, match=r"leaves out reward/kernel: add \|reward"):
        split_trained(leaves, OptimizerConfig(trainable="language/.*"))


# --- the model


@pytest.fixture(scope="module")
def pair():
    """Our tiny model with a head, and the one of `transformers`."""
    config = tiny_config(kv_heads=2, remat="none", reward_head=True)
    theirs, rng = torch_llava(config, seed=2), np.random.default_rng(1)
    head = {"kernel": rng.normal(size=(48, 1)), "bias": rng.normal(size=1)}
    return Llava(config), params_of(theirs) | {"reward": jax.tree.map(jnp.float32, head)}, theirs


def two_groups(config):
    """Two groups of three answers to a picture; of one answer there is nothing."""
    rng, count = np.random.default_rng(3), config.vision.image_tokens
    prefix, prefix_lengths = np.full((2, 1, count + 9), 5, np.int32), np.array([[count + 9], [count + 4]], np.int32)
    prefix[:, 0, 1 : 1 + count] = IMAGE_SLOT
    prefix[:, 0, 1 + count :] = rng.integers(3, 110, (2, 8))
    answers, lengths = rng.integers(3, 110, (2, 3, 6)).astype(np.int32), np.array([[6, 2, 4], [1, 5, 0]], np.int32)
    images = rng.normal(size=(2, 1, 28, 28, 3)).astype(np.float32)
    return Groups(images, prefix, prefix_lengths, answers, lengths)


def test_a_reward_is_a_linear_map_of_the_last_tokens_hidden_state(pair):
    """Of each answer alone behind its prefix, as `transformers` computes it; packed or not."""
    model, params, theirs = pair
    groups = two_groups(model.config)
    got = quick_jit(lambda params, groups: model.rewards(params, groups, (0, 0, 0)))(params, groups)
    packing = Packing(int(groups.prefix_lengths.max() + groups.answer_lengths.sum(1).max() + 4), 14)
    packed = quick_jit(lambda params, groups: model.rewards(params, groups, (0, 0, 0), packing))(params, groups)
    for row, cell in np.argwhere(groups.answer_lengths > 0):
        length = groups.prefix_lengths[row, 0]
        ids = [*groups.prefix_ids[row, 0, :length], *groups.answer_ids[row, cell, : groups.answer_lengths[row, cell]]]
        ids = torch.tensor([[theirs.config.image_token_id if i == IMAGE_SLOT else int(i) for i in ids]])
        pixels = torch.from_numpy(groups.images[row].transpose(0, 3, 1, 2).copy())
        with torch.no_grad():
            hidden = theirs.model(input_ids=ids, pixel_values=pixels).last_hidden_state[0].numpy()
        of_token = lambda n, hidden=hidden: float(
            hidden[n] @ np.asarray(params["reward"]["kernel"])[:, 0] + params["reward"]["bias"][0]
        )
        assert got[row, cell] == pytest.approx(of_token(-1), abs=2e-4 * float(np.abs(hidden).max()))
        assert packed[row, cell] == pytest.approx(float(got[row, cell]), abs=1e-4)
        assert abs(of_token(-2) - of_token(-1)) > 0.05, "the token before is another"


def test_rewards_go_through_no_vocabulary(pair):
    model, params, _ = pair
    groups = two_groups(model.config)
    loss = lambda params: model.rewards(params, groups, (0, 0, 0))[:, :2].sum()
    program = str(jax.make_jaxpr(loss)(params))
    wide = set(re.findall(rf"\[[\d,]*\b{model.config.text.vocab_size}\b[\d,]*\]", program))
    assert wide == {"[48,113]", "[113,48]"}, "nothing but the tables themselves is as wide as the vocabulary"
    with pytest.raises(ValueError, match="hold no reward head"):
        model.rewards({name: tree for name, tree in params.items() if name != "reward"}, groups, (0, 0, 0))


# --- a run on the small world


def one_device(patch):
    for module in (training, answer_scores):
        patch.setattr(module, "make_mesh", lambda config, *_: make_mesh(config, jax.devices()[:1]))
    patch.setattr(jax, "jit", quick_jit)
    patch.setattr(answer_scores, "_rewards", QUICK_REWARDS)


def reward_config(folder):
    """Returns configs/reward7b.py on the small world's base model: adapters of lower rank, and faster."""
    config, world = load_config("configs/reward7b.py"), cure()
    data = {"path": (str(folder / "pairs.parquet"),), "cache": str(folder / "cache"), "batch_size": 8, "held_out": 8}
    return dataclasses.replace(
        config,
        model=world.model,
        data=dataclasses.replace(world.data, **data, buckets=1),
        lora=LoraConfig(rank=4),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=3e-3),
        train=dataclasses.replace(
            config.train, accumulate=1, steps=STEPS, log_every=1, checkpoint_every=SAVED, evaluate_every=STEPS
        ),
    )


def train(config, workdir):
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        one_device(patch)
        training.train(config, workdir, Console(said))
    return said.getvalue()


def leaves_of(workdir, step):
    return dict(load_trained(Run(epath.Path(workdir), step), make_mesh(MeshConfig(), jax.devices()[:1])))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of twenty steps, and its pairs."""
    folder = tmp_path_factory.mktemp("reward")
    write_pairs(folder / "pairs.parquet", 64, seed=9)
    said = train(reward_config(folder), folder / "run")
    return folder, said


def metrics_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_its_margin_rises_and_no_reference_runs(run):
    folder, said = run
    assert not re.search(r"\breference", said)
    assert not (folder / "cache" / "reference").exists()
    rows = metrics_of(folder / "run")
    assert rows[0]["loss"] == pytest.approx(np.log(2), rel=1e-6), "at the first step all rewards are 0"
    assert rows[0]["preference/margin"] == rows[0]["preference/mean_reward"] == 0
    margins = [row["preference/margin"] for row in rows]
    assert np.mean(margins[-4:]) > np.mean(margins[1:5]) + 0.1
    assert np.mean([row["preference/accuracy"] for row in rows[-4:]]) > 0.6
    held_out = [json.loads(line) for line in (folder / "run" / "held_out.jsonl").read_text().splitlines()]
    assert held_out[0]["preference/margin"] == held_out[0]["image_ablated/margin"] == 0
    assert held_out[-1]["preference/margin"] != 0, "eight rows are too few to tell more"
    assert held_out[-1]["image_ablated/margin"] != 0
    head = leaves_of(folder / "run", STEPS)["reward/kernel"]
    assert head.shape == (128, 1)
    assert np.all(np.asarray(head) != 0)


def test_it_goes_on_to_the_same_bits(run):
    folder, _ = run
    shutil.copytree(folder / "run", folder / "again")
    shutil.rmtree(folder / "again" / "checkpoints" / str(STEPS))
    assert f"goes on from step {SAVED}" in train(reward_config(folder), folder / "again")
    straight, again = leaves_of(folder / "run", STEPS), leaves_of(folder / "again", STEPS)
    assert straight.keys() == again.keys() >= {"reward/kernel", "reward/bias"}
    for path, leaf in straight.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


# --- its files


@pytest.fixture(scope="module")
def exported(run):
    folder, _ = run
    said = io.StringIO()
    lines = export.export(export.Options(str(folder / "run"), str(folder / "whole"), dtype="float32"))
    lines += export.export(export.Options(str(folder / "run"), str(folder / "adapters"), peft=True, dtype="float32"))
    assert sum("its reward head is in reward_head.safetensors" in line for line in lines) == 2, said
    return folder


def test_an_export_has_the_head_in_a_file_of_its_own(exported):
    leaves = leaves_of(exported / "run", STEPS)
    for name in ("whole", "adapters"):
        head = dict(tensor_files.read_header(epath.Path(exported / name / "reward_head.safetensors")))
        linear = torch.nn.Linear(128, 1)
        linear.load_state_dict({key: torch.from_numpy(tensor.read().copy()) for key, tensor in head.items()})
        np.testing.assert_array_equal(linear.weight.detach().numpy().T, leaves["reward/kernel"])
        np.testing.assert_array_equal(linear.bias.detach().numpy(), leaves["reward/bias"])
    model, params = load_pretrained(exported / "whole", dtype=jnp.float32, reward_head=True)
    np.testing.assert_array_equal(params["reward"]["kernel"], leaves["reward/kernel"])
    assert model.config.reward_head
    assert "reward" not in load_pretrained(exported / "whole", dtype=jnp.float32)[1]


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda head: head.pop("bias"), r"reward_head\.bias: expected .*\[1\], got none"),
        (lambda head: head.update(other=np.zeros(1, np.float32)), r"reward_head\.other: expected no such tensor"),
        (lambda head: head.update(weight=np.zeros((1, 64), np.float32)), r"expected .*\[1, 128\], got F32 \[1, 64\]"),
        (lambda head: head.clear(), r"reward_head\.bias: expected .*got none"),
    ],
    ids=["missing", "unknown", "another's", "none"],
)
def test_a_head_that_does_not_fit_is_refused(exported, tmp_path, change, line):
    shutil.copytree(exported / "whole", tmp_path / "other", copy_function=lambda a, b: shutil.os.link(a, b))
    file = epath.Path(tmp_path / "other" / "reward_head.safetensors")
    head = {name: tensor.read() for name, tensor in tensor_files.read_header(file)}
    change(head)
    file.unlink()
    if head:
        specs = {name: (tensor.dtype, tensor.shape) for name, tensor in head.items()}
        tensor_files.write_tensors(file, specs, head.values())
    with pytest.raises(ValueError, match=line):
        load_pretrained(tmp_path / "other", dtype=jnp.float32, reward_head=True)


def test_a_reward_model_is_not_asked_to_speak(exported):
    mesh = make_mesh(cure().mesh, jax.devices()[:1])
    for name in ("run", "whole"):
        source = find_model(ModelConfig(path=str(exported / name)))
        assert source.rewards
        with pytest.raises(ValueError, match="is a reward model: it gives numbers to answers"):
            load_speaker(source, mesh)
    assert not find_model(cure().model).rewards


def test_another_run_goes_on_from_its_head(exported):
    """A folder or a run that has a head is where the next one begins, and one without it begins at 0."""
    config = dataclasses.replace(reward_config(exported), lora=LoraConfig())
    mesh, head = make_mesh(MeshConfig(), jax.devices()[:1]), leaves_of(exported / "run", STEPS)["reward/kernel"]
    for path, want in ((exported / "run", head), (exported / "whole", head), (cure().model.path, np.zeros((128, 1)))):
        source = find_model(dataclasses.replace(config.model, path=str(path)))
        trained = load_parts(config, source, make_model(config, source.shape), mesh).trained
        np.testing.assert_array_equal(trained["reward/kernel"], want)
        assert "language/head" not in trained


# --- ranks


@pytest.fixture(scope="module")
def drawn(exported):
    """Seven rows with two or three answers; of one there are none, and of one no picture."""
    (exported / "drawn").mkdir()
    rows = pq.read_table(exported / "pairs.parquet").to_pylist()
    answers = sorted({row["chosen"] for row in rows} | {row["rejected"] for row in rows}, key=len)[:24]
    kept = [row | {"drawn": answers[3 * number : 3 * number + 3]} for number, row in enumerate(rows[:7])]
    kept[6]["drawn"] = kept[6]["drawn"][:2]
    kept[3]["drawn"], kept[5]["image"] = None, b"no picture"
    pq.write_table(pa.Table.from_pylist(kept), exported / "drawn" / "a.parquet", row_group_size=3)
    return exported


def rank(folder, name, reward, **options):
    said = io.StringIO()
    options = {"piece": 2, "batch": 2, "longer": 20.0} | options
    whole = Options(input=(str(folder / "drawn"),), output=str(folder / name), reward=str(reward), **options)
    with pytest.MonkeyPatch.context() as patch:
        one_device(patch)
        summary = build(reward_config(folder), whole, Console(said))
    file = folder / name / "a.parquet"
    return (pq.read_table(file).to_pylist() if file.exists() else None), summary, said.getvalue()


def test_answers_are_ranked_by_their_rewards(drawn, monkeypatch):
    rows, summary, said = rank(drawn, "ranked", drawn / "run")
    assert summary == {"rows": 7, "pairs": {"ranked": 5, "no_answers": 1, "image_unreadable": 1}}
    assert "--data.columns chosen fits rejected fits_least" in said
    assert rows[3]["fits"] is rows[3]["reward_scores"] is rows[5]["fits"] is None
    for one in rows:
        if one["reward_scores"] is not None:
            assert len(one["reward_scores"]) == len(one["drawn"])
            assert len(set(one["reward_scores"])) > 1
            assert one["fits"] == one["drawn"][int(np.argmax(one["reward_scores"]))]
            assert one["fits_least"] == one["drawn"][int(np.argmin(one["reward_scores"]))]
    stricter, summary, said = rank(drawn, "ranked", drawn / "run", gap=1000.0)
    assert "; 0 to go" in said
    assert summary["pairs"]["small_gap"] == 5
    assert [one["reward_scores"] for one in stricter] == [one["reward_scores"] for one in rows]
    asked = []

    def stop(signal):
        asked.append(signal)
        if len(asked) == 6:
            raise StoppedError("asked", 143)

    monkeypatch.setattr(building, "raise_if_asked", stop)
    with pytest.raises(StoppedError):
        rank(drawn, "stopped", drawn / "whole")
    monkeypatch.undo()
    again, _, said = rank(drawn, "stopped", drawn / "whole")
    assert 0 < int(said.partition(" to go")[0].rpartition(" ")[2]) < 7
    assert again == rows


def test_a_rank_is_what_training_scores(exported, monkeypatch):
    """The rewards of a row's pair as a batch of the trainer has them, packed, and as `build_ranked` does."""
    one_device(monkeypatch)
    config = reward_config(exported)
    judge = answer_scores.ByReward(config, str(exported / "whole"), batch=4)
    model, params = judge._loaded
    source = find_model(ModelConfig(path=str(exported / "whole")))
    dataset = open_dataset(
        dataclasses.replace(config.data, held_out=0), methods.reward(), source.tokenizer, source.shape
    )
    batch = next(dataset.loader(dataset.order(batch_size=4), rows=(0, 4))())
    of_training = quick_jit(lambda params, batch: score(model, params, batch, methods.reward()))(params, batch)
    records = [dataset.records[int(number)] for number in batch.ids]
    asked = [judge.ask(record, [record.answers[name] for name in ("chosen", "rejected")]) for record in records]
    want = np.stack([of_training[cell].reward for cell in ("chosen", "rejected")], axis=1)
    np.testing.assert_allclose(judge.scores(asked), want, atol=2e-4)
    assert np.ptp(want) > 0.01
    # In micro-batches, whose log-probs are not there either, a step is one all the same.
    optimizer = make_optimizer(OptimizerConfig(), STEPS)
    trained, frozen = split_trained(flatten(params), OptimizerConfig())
    step = make_train_step(model, methods.reward(), optimizer, accumulate=2)
    with jax.numpy_dtype_promotion("standard"):
        state, metrics = jax.eval_shape(step, init_state(trained, optimizer), Frozen(frozen), batch)
    assert {"preference/mean_reward", "preference/accuracy", "gradient_norm"} <= set(metrics)
    assert state.params["reward/kernel"].shape == (128, 1)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--reward", "{}/run", "--clip", "{}"], "by --clip or by --reward, not by both"),
        (["--reward", "{}/run", "--with-question"], "always reads the question"),
        (["--reward", "{}/run", "--data.image-rule", "crop"], "was trained with data.image_rule pad, and not crop"),
        (["--reward", str(cure().model.path)], "is no reward model: train one with"),
    ],
)
def test_what_cannot_be_used_is_one_line(drawn, arguments, line, capsys):
    words = ["--config", "configs/shapes.py", "--input", "{}/drawn", "--output", "{}/x", *arguments]
    with pytest.raises(SystemExit) as ended:
        exit_with_one_line(lambda: build_ranked.main([word.format(drawn) for word in words]))
    assert ended.value.code == 2
    assert line in capsys.readouterr().err
