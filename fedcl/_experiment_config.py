"""The typed configuration of an experiment; `fedcl.experiment` reads and checks it.

Every section refuses unknown keys and wrong types. Defaults are those shown here; the
resolved file that a run writes has all of them filled in.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt
from pydantic import PositiveInt as Count

from fedcl import _experiment_methods as _methods

Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Method = Annotated[dict[str, Any], AfterValidator(_methods.resolve_method)]
Server = Annotated[dict[str, Any], AfterValidator(_methods.resolve_server)]
Detector = Annotated[dict[str, Any], AfterValidator(_methods.resolve_detector)]
Maker = Annotated[dict[str, Any], AfterValidator(_methods.resolve_phase)]
Switch = Annotated[dict[str, Any], AfterValidator(_methods.resolve_switch)]
Algorithm = Annotated[dict[str, Any], AfterValidator(_methods.resolve_algorithm)]
Paths = Annotated[str, AfterValidator(_methods.resolve_predicate)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A table of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Documents(Section):
    """Documents of a file or a folder, see `fedcl.streams.text`."""

    path: str
    pattern: str | None = None  # Which files of the folder.
    field: str = "text"  # The text's; other fields are kept for grouping.
    # Name: pattern of JSON files of sentences. The documents of each know their `part`
    # and their `number` in it, the same in all parts if these are translations.
    parts: dict[str, str] = Field(default_factory=dict)
    together: Count = 1  # Sentences of a part that make one document.
    first: NonNegativeInt = 0  # Documents to leave out, of each part.
    limit: Count | None = None  # Documents after those, of each part.
    hint: str = ""  # How to get them, if they are not there.


class Grouped(Section):
    """Documents into contexts by a field."""

    by: str
    values: list[str] | None = None  # These, in this order.
    edges: list[float] | None = None  # Intervals of a number, as eras of years.


class Text(Documents):
    """What clients read."""

    length: Annotated[int, Field(ge=2)] = 64  # Tokens of a row.
    eos: bool = True  # A token after each document.
    contexts: Grouped
    clients: str | None = None  # The field that names them; None: stream.partition.
    aligned: Count | None = None  # Test on every n-th `number`, instead of data.test.
    cache: str | None = None  # A folder for tokens.
    general: Documents | None = None  # Nobody trains on it.
    public: Documents | None = None  # The server's own.


class Reader(Section):
    """A text encoder from a file, or a tiny one from scratch, over bytes."""

    kind: Literal["file", "bytes"] = "file"
    path: str | None = None  # A folder.
    package: str | None = None  # The Python package that carries `file`.
    file: str = "model"
    hint: str = ""  # How to get it, if it is not there.
    allow: list[str] | Literal["any"] | None = None  # Licences; None: permissive ones.
    weights: Literal["pretrained", "random"] = "pretrained"
    seed: int = 0  # Of random weights.
    cache: str | None = None  # A folder for features.


class Labelled(Section):
    """Documents of classes, in JSON files of lists."""

    path: str
    pattern: str = "*.json"
    fields: list[str]  # Joined, they are the text.
    label: str  # The field of the class; documents with several are left out.
    classes: Annotated[list[str], Field(min_length=2)]
    per_class: Count | None = None  # The first ones; None: all.
    length: Annotated[int, Field(ge=3)] = 64  # Tokens of a document.
    reader: Reader = Reader()
    hint: str = ""


class Data(Section):
    """Where rows come from, and what is kept for testing."""

    source: Literal["digits", "npz", "idx", "mnist", "tfds", "text", "labelled"] = (
        "digits"
    )
    # npz: the file; idx: the images; mnist: the directory; tfds: the dataset.
    path: str | None = None
    labels: str | None = None  # idx: the labels' file.
    data_dir: str | None = None  # tfds: where prepared datasets are.
    classes: Annotated[int, Field(ge=2)] | None = None  # Known for digits.
    # A fraction of all rows; or the test set that the data bring (mnist, tfds).
    test: Fraction | Literal["official"] = 0.2
    rows: Count | None = None  # Of the training rows, drawn at random; None: all.
    # A share of each client's rows of a context, for the phase "validation"; 0: none.
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # Mean 0 and variance 1 over all inputs of the training rows together.
    standardise: bool = False
    seed: int = 0
    text: Text | None = None  # text
    labelled: Labelled | None = None  # labelled


class Public(Section):
    """The server's own data, and the phases in which it trains on them."""

    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0  # Of all rows.
    # The share of the classes, or of the rotations, that the rows lack; None: as drawn.
    mismatch: Annotated[float, Field(ge=0, le=1)] | None = None
    steps: NonNegativeInt = 0  # Before round 0, on all parameters.
    every: NonNegativeInt = 0  # Also in every n-th round, on φ; 0: never.
    steps_each: Count = 10
    batch_size: Count = 64
    learning_rate: Positive = 3e-3


class Iid(Section):
    kind: Literal["iid"] = "iid"


class Dirichlet(Section):
    kind: Literal["dirichlet"]
    alpha: Positive
    min_rows: NonNegativeInt = 1


class Shards(Section):
    kind: Literal["shards"]
    per_client: Count = 2


class Quantity(Section):
    kind: Literal["quantity"]
    alpha: Positive
    min_rows: NonNegativeInt = 1


class Natural(Section):
    kind: Literal["natural"]
    column: str = "client"


class Abrupt(Section):
    kind: Literal["abrupt"] = "abrupt"


class Staggered(Section):
    kind: Literal["staggered"]
    lag: NonNegativeInt = 0  # Rounds; spread evenly over the clients, 0 to lag.
    order: Literal["same", "random"] = "same"


class Gradual(Section):
    kind: Literal["gradual"]
    width: Count


class Blurry(Section):
    kind: Literal["blurry"]
    blur: Annotated[float, Field(ge=0, le=1)]


class Recurring(Section):
    kind: Literal["recurring"]
    cycles: Count = 2


class Rotations(Section):
    kind: Literal["rotations"]
    degrees: list[float] | None = None  # None: drawn from 0 to `upto`.
    upto: Positive = 180.0
    seed: int = 0


class Permutations(Section):
    kind: Literal["permutations"]
    seed: int = 0


class ClassGroups(Section):
    """Classes by groups, as in class-incremental learning; labels within the group."""

    kind: Literal["class_groups"]


Partition = Annotated[
    Iid | Dirichlet | Shards | Quantity | Natural, Field(discriminator="kind")
]
Drift = Annotated[
    Abrupt | Staggered | Gradual | Blurry | Recurring, Field(discriminator="kind")
]
Domains = Annotated[Rotations | Permutations | ClassGroups, Field(discriminator="kind")]


class Stream(Section):
    """Who sees what when."""

    kind: Literal[
        "class_incremental", "task_incremental", "domain_incremental", "mnist_360"
    ] = "class_incremental"
    contexts: Count = 5
    clients: Count = 20
    rounds_per_context: Count = 10
    partition: Partition = Iid()
    drift: Drift = Abrupt()
    domains: Domains | None = None  # For "domain_incremental".
    order: list[int] | None = None  # Of the classes.
    join: list[int] | None = None  # Round in which each client joins.
    leave: list[int] | None = None
    hidden: bool = False
    empty: Literal["raise", "absent"] = "absent"
    draw: Literal["replacement", "epochs", "order"] = "replacement"
    seed: int = 0


class Tuned(Section):
    """What is trained in the federated phase."""

    train: Literal["full", "head", "lora", "prompt", "dual_adapters"] = "full"
    rank: Count = 4  # lora
    alpha: Positive = 8.0  # lora
    prompt: Count = 4  # prompt: vectors before the tokens
    adapter: Count = 8  # dual_adapters: width of each


class Mlp(Tuned):
    kind: Literal["mlp"] = "mlp"
    hidden: list[Count] = Field(default_factory=lambda: [64])
    activation: Literal["relu", "sigmoid", "tanh"] = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    init: Literal["lecun", "torch"] = "lecun"
    projection: NonNegativeInt = 0  # Random features before the head; 0: none.


class Convnet(Tuned):
    kind: Literal["convnet"]
    widths: list[Count] = Field(default_factory=lambda: [16, 32])
    kernel: Count = 3
    groups: Count = 4
    pool: Literal["max", "avg"] = "max"
    form: Literal["patches", "conv"] | None = None  # None: by the backend.


class Vit(Tuned):
    kind: Literal["vit"]
    patch: Count = 2
    width: Count = 32
    depth: Count = 2
    heads: Count = 2
    pool: Literal["mean", "class"] = "mean"
    unroll: bool = True


class Encoder(Tuned):
    """The encoder of data.labelled with a head, reading tokens."""

    kind: Literal["encoder"]


class Peft(Section):
    """What is trained beside a frozen base."""

    method: Literal["lora", "prompt"] = "lora"
    length: Count = 8  # prompt: vectors before the tokens.
    rank: Count = 8
    alpha: Positive = 16.0
    targets: list[str] = Field(default_factory=lambda: ["q", "v"])  # Last of the path.


class Pretrained(Section):
    """A language model from a file: of this path, or of an installed package."""

    kind: Literal["pretrained"]
    path: str | None = None  # A folder, or a .gguf file.
    package: str | None = None  # The Python package that carries `file`.
    file: str = "*.gguf"
    hint: str = ""  # How to get it, if it is not there.
    allow: list[str] | Literal["any"] | None = None  # Licences; None: permissive ones.
    peft: Peft | None = Peft()  # None: everything is trained.


class Decoder(Section):
    """A small language model from scratch, over bytes."""

    kind: Literal["decoder"]
    width: Count = 32
    depth: Count = 2
    heads: Count = 2
    hidden: Count = 64
    layout: Literal["llama", "gpt2"] = "llama"
    peft: Peft | None = Peft()


Model = Annotated[
    Mlp | Convnet | Vit | Encoder | Pretrained | Decoder, Field(discriminator="kind")
]


class Client(Section):
    """The optimiser of the local steps."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    learning_rate: Positive = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # sgd
    weight_decay: Annotated[float, Field(ge=0)] = 0.0  # adamw
    clip: Positive | None = None  # Each component of the gradient, to ±clip.
    backbone: Positive | None = None  # Rate of all but the head, by the head's.
    policy: Literal["reset", "keep", "average"] = "reset"
    # How the local steps are computed, see `fedcl.compute`.
    precision: Literal["float32", "bfloat16"] = "float32"  # Of the model's products.
    accumulate: Count = 1  # Parts of a batch, one after another.
    remat: bool = False  # Activations computed again, not kept.


class Federation(Section):
    """Who takes part in a round, and what a round is."""

    cohort: Count = 8
    available: Share = 1.0  # Probability that a client can be drawn.
    shards: Count = 1  # Parts of the population of which each gives as many clients.
    steps: Count = 5  # Local steps; for draw = "replacement", else set by the data.
    epochs: Count = 1  # With draw = "epochs".
    batch_size: Count = 16
    client: Client = Client()
    server: Server = Field(default_factory=lambda: {"method": "weighted_mean"})
    clip: Positive | None = None  # Norm to which each client's update is clipped.
    schedule: Literal["vmap", "scan", "auto"] | Count = "vmap"
    store: str | None = None  # A folder for the clients' states; None: on the device.
    nonfinite: Literal["raise", "drop"] = "raise"


class Arm(Section):
    """One line of the comparison: methods, chained."""

    chain: list[Method] = Field(default_factory=list)
    algorithm: Algorithm | None = None  # Instead of federated averaging with a chain.
    personal: Paths | None = None  # What of φ stays on its client.
    detector: Detector | None = None  # Boundaries from the data, not the stream.
    review_every: NonNegativeInt = 0  # Rounds; 0: when a client's context ends.
    before: list[Maker] = Field(default_factory=list)  # Phases before the federated.
    phases: list[Maker] = Field(default_factory=list)  # Phases after it.
    server: Server | None = None  # Instead of the federation's.
    client: Client | None = None  # Instead of the federation's.
    batch_size: Count | None = None  # Instead of the federation's.
    loss: Literal["softmax", "sigmoid"] = "softmax"
    start: Literal["public", "random"] = "public"  # After public.steps, or before.
    # The server trains in the rounds in which all are on; []: never; None: see [public].
    switch: list[Switch] | None = None
    frozen: bool = False  # Nobody trains: the model as it is.
    public: bool = True  # Whether the rounds have the phase of [public].
    lorm: bool = False  # Adapters in turn, merged in closed form; text.
    # Mixed in every round: "all" contexts, the ceiling; or all met so "far".
    joint: Literal["all", "far"] | None = None


class Evaluation(Section):
    every: Count = 5  # Rounds.
    chunk: Count = 512  # Rows per forward pass.
    limit: Count | None = None  # Test rows per context; None: all.
    target: Fraction | None = None  # Mean accuracy over contexts; rounds are counted.
    forgetting: Literal[
        "chaudhry", "mammoth", "avalanche", "fed_mammoth", "mfcl", "fot", "sequel"
    ] = "chaudhry"


class Checkpoint(Section):
    every: NonNegativeInt = 10  # Rounds; 0: no checkpoints, no resuming.
    keep: Count = 2


class Experiment(Section):
    """A whole experiment."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    about: str = ""
    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        default_factory=lambda: [0]
    )
    data: Data = Data()
    public: Public = Public()
    stream: Stream = Stream()
    model: Model = Mlp()
    federation: Federation = Federation()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    # A run for each combination: "stream.partition" = [{ kind = "iid" }, …].
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(
        default_factory=dict
    )
    arms: Annotated[
        dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")], Arm],
        Field(min_length=1),
    ]
