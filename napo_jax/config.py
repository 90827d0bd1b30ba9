"""What a run is told: frozen dataclasses, read from a config file and overridden by flags.

A config file defines `get_config() -> Config`; one that comes along may be named without folder and ending. Every field
below is a flag of every command, `--data.batch-size 8`.
"""

import dataclasses
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from napo_jax.command import read_flags
from napo_jax.fields import check_fields
from napo_jax.methods import napo
from napo_jax.mixed_reference import Mixing
from napo_jax.models.lora import LoraConfig
from napo_jax.objective import Objective
from napo_jax.optim import OptimizerConfig
from napo_jax.sharding import MeshConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it computes."""

    # A Hugging Face folder in any layout, or the workdir of an earlier run: its last checkpoint. Without one, a random
    # model and a tokenizer of bytes: to try things out.
    path: str | None = None
    # The size that the folder must have; without a folder, that of the random model, "tiny" by default. "shapes" is the
    # small world's model, with its tokenizer.
    size: Literal["tiny", "shapes", "7b", "13b"] | None = None
    # Type of activations and matrix products; what needs float32 has it anyway.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # "auto", "xla", "cudnn" (NVIDIA GPU) or "splash" (TPU).
    attention: str = "auto"
    # What the decoder stores for the backward pass: "none" recomputes nothing, "dots" a little, "mlp" the attention and
    # its products, "full" each layer. In this order they take ever less memory and ever more time.
    remat: Literal["none", "dots", "mlp", "full"] = "full"

    def __post_init__(self):
        """Checks the fields' types and choices."""
        check_fields(self, "model")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which records, and how they become batches."""

    # Parquet or JSONL files: a path, several, a glob or a folder. None: this many made-up records instead.
    path: tuple[str, ...] | None = None
    made_up: int = 256
    # Our name of a column and theirs, in pairs, where they differ: question prompt image picture.
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    # The folder that image paths in the records start from.
    image_root: str | None = None
    # Where records are kept for random access; None: napo_jax/ in the user's cache folder.
    cache: str | None = None
    # Groups per step, over all devices.
    batch_size: int = 32
    # The conversation around question and answer.
    template: Literal["llava_v1", "vicuna_v1"] = "llava_v1"
    # "pad" to a square in the mean colour, as LLaVA trains and evaluates; "crop" the centre, as NaPO's code trains.
    image_rule: Literal["pad", "crop"] = "pad"
    # Whether pictures are turned as their camera noted; the released code ignores the note.
    exif: bool = False
    # The most pictures of a record: with more than one, those of the column `images` are taken. Rows with more of them
    # are dropped and counted, and each picture takes its 576 tokens of `max_tokens`.
    pictures: int = 1
    # The most tokens of a prefix, its images and one answer together.
    max_tokens: int = 2048
    # What becomes of an answer that is longer: "cut" its end, as released, or "drop" the row.
    long_answers: Literal["cut", "drop"] = "cut"
    # What becomes of a row that compares an answer with itself: "keep" or "drop".
    identical: Literal["keep", "drop"] = "keep"
    # "thirds" trains from easy to hard: the rows' thirds by their column `difficulty`, each as often as `epochs` say
    # before the next one; "none" takes all of them together.
    curriculum: Literal["none", "thirds"] = "none"
    # Groups that are set apart to evaluate on, by their pictures: no picture is on both sides.
    held_out: int = 0
    # The most shapes that are compiled.
    buckets: int = 8
    # Attention's tokens are a multiple of this; TPU kernels need 128.
    attention_multiple: int = 128
    # Of the order of batches, and of what is random about a record.
    seed: int = 0
    # Batches decoded at a time, and processes to decode in (0: the main one).
    threads: int = 8
    workers: int = 0

    def __post_init__(self):
        """Checks the fields' types and choices, and the numbers."""
        if isinstance(self.path, str):
            object.__setattr__(self, "path", (self.path,))
        check_fields(self, "data")
        for name in ("batch_size", "buckets", "attention_multiple", "threads", "made_up", "max_tokens", "pictures"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "seed", "held_out"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must not be negative, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise ValueError(f"data.seed must be below 2**32, got {self.seed}")
        if self.attention_multiple > 2**15:
            raise ValueError(f"data.attention_multiple must be at most {2**15}, got {self.attention_multiple}")
        if self.path is not None and not self.path:
            raise ValueError("data.path is empty; name files, a folder or a glob")
        if self.cache is not None and "://" in self.cache:
            raise ValueError(f"data.cache must be a local folder, got {self.cache}")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long to train, and what is said and saved on the way."""

    # Steps in all; None: as many as `epochs` take.
    steps: int | None = None
    epochs: float = 4.0
    # Micro-batches that a batch is computed in, for less memory: with more than one, a forward pass is added.
    accumulate: int = 1
    # The reference's log-probs: "cache" computes them once and keeps them on disk, "live" runs a second model in every
    # step, "adapters_off" runs the same model without its LoRA adapters, and with a trained projector as it was.
    reference: Literal["cache", "live", "adapters_off"] = "cache"
    # A second reference, mixed into the first (MRPO); it takes the first from the cache.
    second: Mixing = dataclasses.field(default_factory=Mixing)
    # Steps between lines of metrics, between evaluations of the groups held out, and between checkpoints; the last step
    # has them all, and there is an evaluation before the first.
    log_every: int = 10
    evaluate_every: int = 500
    checkpoint_every: int = 500
    # The latest checkpoints that are kept, and besides the best by a metric of evaluations: loss, or another that is
    # larger where it is better, such as preference/margin.
    keep: int = 3
    keep_best: int = 0
    best_metric: str = "loss"
    # Keep compiled programs in the workdir: the next start loads them. JAX_COMPILATION_CACHE_DIR names another folder.
    compile_cache: bool = True
    # Write metrics for TensorBoard too, into the workdir; the name of a project, to log them to W&B.
    tensorboard: bool = False
    wandb: str | None = None
    # Of a random model's parameters.
    seed: int = 0

    def __post_init__(self):
        """Checks the fields' types and choices, and the numbers."""
        check_fields(self, "train")
        for name in ("steps", "accumulate", "log_every", "evaluate_every", "checkpoint_every", "keep"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, got {value}")
        if self.second.path is not None and self.reference != "cache":
            raise ValueError(f"train.second.path needs train.reference cache, and it is {self.reference}")
        if self.epochs <= 0:
            raise ValueError(f"train.epochs must be positive, got {self.epochs}")
        if self.keep_best < 0:
            raise ValueError(f"train.keep_best must not be negative, got {self.keep_best}")
        if self.keep_best and self.checkpoint_every % self.evaluate_every:
            raise ValueError(
                f"train.keep_best needs an evaluation at each checkpoint: train.checkpoint_every "
                f"{self.checkpoint_every} must be a multiple of train.evaluate_every {self.evaluate_every}"
            )


@dataclasses.dataclass(frozen=True)
class Config:
    """All of a run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    # Which answers under which images are compared, and how: set in the config file.
    objective: tyro.conf.Suppress[Objective] = dataclasses.field(default_factory=napo)

    def __post_init__(self):
        """Checks what one part needs of another."""
        if self.data.batch_size % self.train.accumulate:
            raise ValueError(
                f"data.batch_size {self.data.batch_size} does not divide into train.accumulate {self.train.accumulate}"
            )
        if self.train.keep_best and not self.data.held_out:
            raise ValueError("train.keep_best needs groups to evaluate on: set data.held_out")
        if self.train.reference == "adapters_off" and not self.lora.rank:
            raise ValueError("train.reference is adapters_off and there are no adapters: set lora.rank, or use cache")


def shipped_configs() -> Path:
    """Returns the folder of the configs that come along: inside a wheel's package, beside it in the repository."""
    package = Path(__file__).parent
    return inside if (inside := package / "configs").is_dir() else package.parent / "configs"


def find_config(file) -> Path:
    """Returns the file of a config: the path itself, or one of those that come along, `llava7b` or configs/llava7b.py.

    Raises one line, with the names that there are, if it is neither.
    """
    path, shipped = Path(file), shipped_configs()
    if path.is_file() and path.suffix == ".py":
        return path
    if (along := shipped / f"{path.stem}.py").is_file() and str(path) in (path.stem, f"configs/{path.stem}.py"):
        return along
    beside = path.parent if path.suffix == ".py" and path.parent.is_dir() else shipped
    near = [] if beside.resolve() == shipped.resolve() else sorted(map(str, beside.glob("*.py")))
    there = ", ".join([*near, *sorted(known.stem for known in shipped.glob("*.py"))])
    raise ValueError(f"no config file {file}; there are {there or 'none'}")


def load_config(file) -> Config:
    """Runs a config file, given as `find_config` takes it, and returns what its `get_config` makes.

    Raises one line if it makes none.
    """
    path = find_config(file)
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # a program, which fails in any way
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f", line {frames[-1].lineno}" if frames else ""
        raise ValueError(f"{file}{where} fails: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{file} must define get_config() that returns a napo_jax.config.Config, got {config!r}")
    return config


_CONFIG_FLAG = tyro.conf.arg(
    help="A file that defines get_config(), or the name of one that comes along, such as llava7b.", metavar="FILE"
)


def parse(options: type, argv=None, *, description: str) -> tuple[Config, Any]:
    """Reads a command line: `--config FILE`, the command's own options, and any field of the config.

    Args:
      options: a dataclass of the command's own options.
      argv: the arguments; None for the program's.
      description: what `--help` says of the command.

    Returns:
      the config, and an instance of `options`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    file, rest = _take_config(argv)
    default = load_config(file) if file else Config()

    command = dataclasses.make_dataclass(
        "Command",
        [
            ("config", Annotated[str | None, _CONFIG_FLAG]),
            ("options", Annotated[options, tyro.conf.arg(name="")]),
            ("run", Annotated[Config, tyro.conf.arg(name="")]),
        ],
    )
    given = read_flags(command, rest, description=description, default=command(file, options(), default))
    if not file:
        raise ValueError("say which config to use: --config configs/debug.py, for example")
    if given.config != file:
        raise ValueError(f"--config is given twice, {file} and {given.config}; name one file")
    return given.run, given.options


def config_name(argv=None) -> str:
    """Returns the name of the config file that a command line names, without its folder and ending."""
    return Path(_take_config(list(sys.argv[1:] if argv is None else argv))[0]).stem


def _take_config(argv):
    """Returns the value of --config, None if there is none, and the other arguments."""
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
    return None, argv
