"""The flags of sqa-convert: their types, and what --help says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..conversion.fitting import EFFORTS
from ..conversion.request import LEAST_LENGTH
from ..heads import AUTO, METHODS
from .flags import TEXT, count, listing

HEADS, CALIBRATE, SOURCE, OUTPUT, MEASURE = "Heads", "Calibrate", "Source", "Output", "Measure and uptrain"

_DEFAULT = EFFORTS["default"]


def _list_methods() -> None:
    print(f"{AUTO:10} try the best of these on calibration text, take what leaves the model nearest to the source")
    for method in METHODS.values():
        print(f"{method.name:10} {method.summary}\n{'':10} {method.source}")


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A hub id (gpt2, google-t5/t5-small), a folder, sample:gpt2 or sample:t5."),
]

QGroups = Annotated[
    int | None,
    typer.Option(
        "--q-groups",
        metavar="N",
        rich_help_panel=HEADS,
        help="Query heads that a layer keeps, on average. ('Query groups' elsewhere counts key/value heads.)",
    ),
]

KvGroups = Annotated[
    int | None,
    typer.Option("--kv-groups", metavar="M", rich_help_panel=HEADS, help="Key/value heads, likewise. M must divide N."),
]

Variant = Annotated[
    str | None,
    typer.Option(rich_help_panel=HEADS, help="Instead of the two numbers: gqa, mqa, sqa, ssqa, xsqa, xsmqa, lsqa."),
]

Method = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HEADS, help="How heads are merged. Default: auto, the best on text; or see --list-methods."
    ),
]

Partition = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HEADS, help="Which heads go together: searched or contiguous. Default: as suits the method."
    ),
]

Allocation = Annotated[
    str,
    typer.Option(
        metavar="HOW",
        rich_help_panel=HEADS,
        help="uniform, as many heads in each layer; adaptive, as many in total, more where predictions need them; "
        "auto, adaptive where heads are fitted to text; or the counts of every layer, as 4/2,8/4,10/5,10/5.",
    ),
]

Target = Annotated[
    list[str] | None,
    typer.Option(
        metavar="BOUND",
        rich_help_panel=HEADS,
        help="kl<=0.05, or a share of the source's: prefill, decode, cache, flops, parameters<=0.8x. Several may be "
        "given; the cheapest point of a sweep that holds all is taken.",
    ),
]

Sites = Annotated[
    str | None,
    typer.Option(rich_help_panel=HEADS, help="Attentions to convert, as encoder,decoder,cross. Default: all."),
]

Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        rich_help_panel=CALIBRATE,
        help="Text to fit the heads on, as --data, or self: what the model writes. Default: the training part of "
        "--data; else GPT-2 samples its own, T5 reads the built-in corpus.",
    ),
]

CalibrationPrompts = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", rich_help_panel=CALIBRATE, help="Beginnings that a GPT-2's own texts go on from, one a line."
    ),
]

CalibrationLength = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=count(LEAST_LENGTH),
        rich_help_panel=CALIBRATE,
        help="Tokens of the longest sequence. Default: the model's context, at most 1024.",
    ),
]

SourceColumn = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        rich_help_panel=CALIBRATE,
        help="Of --calibration or --data, for T5: with --target-column, pairs that it reads and answers.",
    ),
]

TargetColumn = Annotated[
    str, typer.Option(metavar="NAME", rich_help_panel=CALIBRATE, help="What is answered to --source-column.")
]

Prefix = Annotated[
    str,
    typer.Option(
        metavar="TEXT", rich_help_panel=CALIBRATE, help='Put before each source of a pair, such as "summarize: ".'
    ),
]

CalibrationTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        parser=count(),
        rich_help_panel=CALIBRATE,
        help=f"Also as 400k or 5M. Default: 20 for each unknown of a fit, at least {_DEFAULT.tokens}; fewer on a CPU "
        "for a large model that writes them.",
    ),
]

Effort = Annotated[
    str,
    typer.Option(
        "--effort",
        metavar="|".join(EFFORTS),
        rich_help_panel=CALIBRATE,
        help="How much text and how many steps, where --calibration-tokens, --refine-steps and --polish-steps do not "
        "say: light is a third of the time or less, best several times as long.",
    ),
]

Memory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE", rich_help_panel=CALIBRATE, help="To calibrate in on a CPU, as 8GB. Default: all free."
    ),
]

Refit = Annotated[
    bool | None,
    typer.Option(
        "--refit/--no-refit",
        rich_help_panel=CALIBRATE,
        help="Output projections by least squares. Default: for auto, svd and procrustes.",
    ),
]

RefineSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=CALIBRATE,
        help=f"Steps of layer-wise training. Default: {_DEFAULT.refine_steps} for auto, svd and procrustes, else 0.",
    ),
]

PolishSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=CALIBRATE,
        help=f"Steps of training the whole model towards the source. Default: {_DEFAULT.polish_steps} as for "
        "--refine-steps; on a CPU fewer for a large model.",
    ),
]

NoCalibration = Annotated[
    bool,
    typer.Option("--no-calibration", rich_help_panel=CALIBRATE, help="From the weights alone; the model is not run."),
]

Revision = Annotated[str | None, typer.Option(rich_help_panel=SOURCE, help="Branch, tag or commit on the hub.")]

Subfolder = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", rich_help_panel=SOURCE, help="Of a pipeline of several models, here or on the hub."),
]

Tokenizer = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        rich_help_panel=SOURCE,
        help="Of a tokenizer elsewhere: beside the model's folder, anywhere, or a hub id.",
    ),
]

TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", rich_help_panel=SOURCE, help="Let code that MODEL brings along run. Default: never."
    ),
]

Output = Annotated[
    Path | None, typer.Option("--output", "-o", rich_help_panel=OUTPUT, help="Default: ./NAME-sqa-qNkvM.")
]

Overwrite = Annotated[
    bool, typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the output folder if it exists.")
]

Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        rich_help_panel=OUTPUT,
        help="Go on with the calibration of a run that was stopped, where the same command is repeated.",
    ),
]

Dtype = Annotated[
    str, typer.Option(rich_help_panel=OUTPUT, help="auto keeps the source's; float32, bfloat16, float16.")
]

MaxShardSize = Annotated[
    str, typer.Option(rich_help_panel=OUTPUT, help="Largest weight file, such as 300MB; at least 1MB.")
]

NoVerify = Annotated[
    bool, typer.Option("--no-verify", rich_help_panel=OUTPUT, help="Do not read the written weights again.")
]

DryRun = Annotated[
    bool, typer.Option("--dry-run", rich_help_panel=OUTPUT, help="Show the plan and stop; reads no weights.")
]

Uptrain = Annotated[
    str | None,
    typer.Option(metavar="RECIPE", rich_help_panel=MEASURE, help="Then train: a recipe's name (quick) or a YAML file."),
]

Control = Annotated[
    bool,
    typer.Option("--control", rich_help_panel=MEASURE, help="Also train the source on the same tokens, to compare."),
]

Data = Annotated[str | None, typer.Option(rich_help_panel=MEASURE, help=TEXT)]

TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=MEASURE,
        help="Of --data and --calibration, where they are tables: the column that holds the text. Default: text.",
    ),
]

NoEvaluate = Annotated[
    bool,
    typer.Option(
        "--no-evaluate",
        rich_help_panel=MEASURE,
        help="Do not measure loss and KL (for models that do not fit, with --no-calibration).",
    ),
]

Device = Annotated[
    str,
    typer.Option(rich_help_panel=MEASURE, help="To calibrate, measure and train on: auto, cpu, cuda, cuda:1, mps."),
]

Seed = Annotated[
    int | None, typer.Option(rich_help_panel=MEASURE, help="Of everything random. Default: the recipe's, or 0.")
]

ListMethods = Annotated[
    bool,
    typer.Option(
        "--list-methods", callback=listing(_list_methods), is_eager=True, rich_help_panel=HEADS, help="List them."
    ),
]
