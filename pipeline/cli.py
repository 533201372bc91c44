"""The `raylign` command.

Exit codes: 0 done; 1 a stage or gate failed; 2 the spec, the data or the arguments are wrong; 130 interrupted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.exceptions import TyperException

from stages.capacity import Capacity
from stages.errors import RaylignError

app = typer.Typer(
    name="raylign", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    help="From a base model and conversations to an aligned model. Add --debug to any command for tracebacks.",
)  # fmt: skip
console = Console()

SpecPath = Annotated[Path, typer.Argument(metavar="SPEC", help="The spec, a YAML file.")]
RunPath = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, or its address in an object store.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Override one value of the spec.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


@app.command()
def run(spec: SpecPath, set: Overrides = None) -> None:
    """Carry a spec out; goes on where an earlier run of it stopped."""
    from pipeline.plan import make_plan
    from pipeline.report.reading import read_run
    from pipeline.runner import run_plan
    from pipeline.spec_reader import load_spec
    from pipeline.tables import render_run

    plan = make_plan(load_spec(spec, set or []))
    _warn(plan.spec.warnings())
    try:
        run_plan(plan)
    finally:
        if (plan.folder.path / "run.json").is_file():
            console.print()
            console.print(render_run(read_run(plan.folder, whole=False)))
            console.print(f"\nrun folder: {plan.folder.address}", soft_wrap=True, highlight=False)


@app.command()
def plan(spec: SpecPath, set: Overrides = None, as_json: Json = False) -> None:
    """What would run: order, cached or not, rows, steps, memory, disk and resources, and what makes it fit. Starts nothing."""
    from pipeline.estimate import describe
    from pipeline.plan import make_plan
    from pipeline.spec_reader import load_spec
    from pipeline.tables import render_plan

    made = make_plan(load_spec(spec, set or []))
    _warn(made.spec.warnings())
    rows = describe(made, _cluster_resources())
    if as_json:
        print(json.dumps({"stages": rows}, indent=1))
    else:
        console.print(render_plan(rows), soft_wrap=True)


def _warn(says: list[str]) -> None:
    for each in says:
        Console(stderr=True).print(
            f"warning: {each}", style="bold yellow", highlight=False, markup=False, soft_wrap=True
        )


def _cluster_resources() -> Capacity | None:
    """What the cluster of RAY_ADDRESS has and can grow to; None for this machine."""
    if not os.environ.get("RAY_ADDRESS"):
        return None
    from pipeline.cluster import RayCluster

    return RayCluster().capacity()


@app.command()
def inspect(
    spec: SpecPath,
    stage: Annotated[str | None, typer.Option(help="The stage; all that read data if absent.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="Rows to show of each stage.")] = 3,
    set: Overrides = None,
    as_json: Json = False,
    html: Annotated[Path | None, typer.Option(help="Write a page instead.")] = None,
) -> None:
    """Real rows as the model will see them, what is trained of them, and what is left out and why."""
    from pipeline.inspection import as_json as contract
    from pipeline.inspection import inspect as look
    from pipeline.inspection import page, terminal
    from pipeline.plan import make_plan
    from pipeline.spec_reader import load_spec

    plan = make_plan(load_spec(spec, set or []))
    found = look(plan, stage, n)
    if html is not None:
        html.write_text(page.render(found, plan.spec.name), encoding="utf-8")
        console.print(f"written: {html}", highlight=False)
    elif as_json:
        print(json.dumps(contract(found), indent=1))
    else:
        terminal.show(found, console)


@app.command()
def status(run: RunPath) -> None:
    """The state of a run."""
    from pipeline.report.reading import open_run, read_run
    from pipeline.tables import render_run

    folder = open_run(run)
    found = read_run(folder, whole=False)
    state = found.state
    if state == "running" and not folder.is_locked():
        state = "interrupted (its process is gone); run the spec again to go on"
    console.print(f"{found.name}: {state}", markup=False)
    console.print(render_run(found))


@app.command()
def report(run: RunPath) -> None:
    """Write the run's HTML report again and print its path."""
    from pipeline.report import report_again

    print(report_again(run))


@app.command()
def chat(
    run: RunPath,
    stage: Annotated[
        list[str] | None,
        typer.Option(help="The stage whose model to talk to, the last one if absent; several answer side by side."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 256,
) -> None:
    """Talk to the model that came out. An empty line or end of input ends it."""
    from pipeline.chat import talk

    talk(run, stage or [], max_new_tokens, console)


@app.command()
def push(
    run: RunPath,
    to: Annotated[str, typer.Option(metavar="ORG/NAME", help="The repository; it is made if it is not there.")],
    stage: Annotated[str | None, typer.Option(help="The stage whose model to push; the last one if absent.")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="As the account has it where neither is said.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files and print the card; nothing is sent.")
    ] = False,
) -> None:
    """Publish a model of a run on the Hugging Face hub, with a card that says where it comes from and what was found of it."""
    from pipeline.hub import push_by_hand

    for line in push_by_hand(run, stage, to, private, dry_run):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def init(
    model: Annotated[
        str,
        typer.Option(
            help="Hub id or folder of the base model; tiny: a fresh small one, which needs no hub and trains on a laptop."
        ),
    ] = "tiny",
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="What to learn from (.jsonl, .json, .csv, also .gz, .parquet): file, glob, folder or hf://name. May be given "
            "several times."
        ),
    ] = None,
    preference: Annotated[
        list[str] | None,
        typer.Option(help="Preference pairs, or answers with a label, for a DPO or KTO stage after SFT."),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NEW=OLD",
            help="What a column is, in each file that has it, of --data and --preference: prompt=question. May be given "
            "several times.",
        ),
    ] = None,
    convert: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="FILE", help="Convert a configuration of TRL, LLaMA-Factory or axolotl instead."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The spec to write.")] = Path("spec.yaml"),
) -> None:
    """Write a commented spec that runs: from data and a model, or from another tool's configuration."""
    if convert is not None:
        from pipeline.converter import write_converted

        if data or preference or columns or model != "tiny":
            raise typer.BadParameter("goes alone: model and data are those of the file", param_hint="--from")
        lines = write_converted(convert, out)
    elif not data and not preference:
        raise typer.BadParameter(
            "what to learn from is wanted: raylign init --data FILE, or --from THEIR.yaml", param_hint="--data"
        )
    else:
        from pipeline.starter import write_starter

        pairs = [each.partition("=") for each in columns or []]
        if wrong := next((new + old for new, equals, old in pairs if not (new and equals and old)), None):
            raise typer.BadParameter(
                f"{wrong}: write it as NEW=OLD, for example prompt=question", param_hint="--columns"
            )
        named = {old: new for new, _, old in pairs}
        if twice := next((old for new, _, old in pairs if named[old] != new), None):
            raise typer.BadParameter(f"{twice} is given two names", param_hint="--columns")
        lines = write_starter(out, model, data or [], preference or [], named)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def doctor(as_json: Json = False) -> None:
    """What this machine and its cluster have for training, what is missing, and the command for it."""
    from pipeline.doctor import examine, render

    found = examine()
    if as_json:
        print(json.dumps({"checks": [check.as_json() for check in found]}, indent=1))
    else:
        console.print(render(found), soft_wrap=True)
    raise typer.Exit(int(any(check.state == "problem" for check in found)))


@app.command()
def submit(
    spec: SpecPath,
    address: Annotated[
        str,
        typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, for example http://head:8265."),
    ],
    set: Overrides = None,
    env: Annotated[list[str] | None, typer.Option(help="Name of an environment variable to send along.")] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job's log to its end.")] = True,
) -> None:
    """Run the same spec as a Ray job on a cluster, and follow its log. While the job runs, the same command follows it."""
    from pipeline.submit import submit_spec

    raise typer.Exit(submit_spec(spec, address, set or [], env or [], wait))


@app.command()
def schema(
    out: Annotated[
        Path | None, typer.Option(help="Write it to a file; `raylign init` writes .raylign-schema.json.")
    ] = None,
) -> None:
    """The spec's JSON Schema, for editors: a spec names it in its first line, `# yaml-language-server: $schema=FILE`."""
    from pipeline.spec import json_schema

    text = json.dumps(json_schema(), indent=1)
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")
        console.print(f"written: {out}", highlight=False)


def main() -> None:
    debug = "--debug" in sys.argv
    sys.argv = [arg for arg in sys.argv if arg != "--debug"]
    errors = Console(stderr=True)
    signal.signal(signal.SIGTERM, _interrupted)  # as Ctrl-C: end the stages, record the state
    try:
        _invoke()
    except RaylignError as error:
        if debug:
            errors.print_exception()
        errors.print(f"error: {error}", style="red", highlight=False, markup=False, soft_wrap=True)
        _exit(error.exit_code)
    except TyperException as error:
        if message := error.format_message():  # empty where the help was asked for by giving nothing
            errors.print(f"error: {message}; see --help", style="red", highlight=False, markup=False)
        _exit(2)
    except (KeyboardInterrupt, typer.Abort):
        errors.print("interrupted; run the same command again to go on", style="yellow")
        _exit(130)
    except BrokenPipeError:
        os._exit(0)  # `raylign schema | head`
    except OSError as error:
        if debug:
            errors.print_exception()
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        errors.print(f"error: {what}", style="red", highlight=False, markup=False, soft_wrap=True)
        _exit(2)
    except Exception as error:
        if debug:
            errors.print_exception()
        text = f"error: {type(error).__name__}: {error}\n  this is a bug of raylign; --debug shows where"
        errors.print(text, style="red", highlight=False, markup=False, soft_wrap=True)
        _exit(1)


def _invoke() -> Any:
    code = app(standalone_mode=False)
    if code == 130:  # typer's answer to Ctrl-C
        raise KeyboardInterrupt
    if isinstance(code, int) and code:
        _exit(code)


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if "ray" in sys.modules else sys.exit(code)  # Ray's threads may keep a process from ending
