"""`ctcgrpo sweep`."""

import functools
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from ctcgrpo.errors import RecipeError, RunFailed
from ctcgrpo.experiments.spec import NAME, load_sweep
from ctcgrpo.util.importing import installing
from ctcgrpo.util.naming import did_you_mean
from ctcgrpo.util.terminal import Terminal, print_line


def sweep(
    file: Annotated[Path, typer.Argument(help="The sweep: a search in W&B's format, or variants with seeds (configs/sweeps).")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.field=value for every run ...")] = None,
    name: Annotated[str | None, typer.Option(help="The folder under --out (default: the file's name).")] = None,
    out: Annotated[Path, typer.Option(help="The parent folder of sweeps.")] = Path("checkpoints") / "sweeps",
    workers: Annotated[int, typer.Option(min=1, help="Parallel trials.")] = 1,
    devices: Annotated[list[str] | None, typer.Option(help="GPUs of one worker, as 0,1; repeat for each worker.")] = None,
    against: Annotated[str | None, typer.Option(help="Print differences to this variant instead of the baseline.")] = None,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Create the sweep on W&B instead, and print how to start agents.")
    ] = False,
) -> None:
    """Run a recipe many times: a search over its fields, or several variants; the same command resumes the sweep."""
    spec, recipe = load_sweep(file, overrides or [])
    if against is not None and against not in spec.variants:
        raise RecipeError(f"--against {against!r}: {did_you_mean(against, spec.variants)}")
    if wandb:
        if name or overrides or devices or spec.variants or spec.seeds:
            raise RecipeError("--wandb sends the file as it is; expected no other options, variants or seeds; edit the file")
        from ctcgrpo.run.weights_and_biases import hand_over

        print(hand_over(file))
        return
    try:
        from ctcgrpo.experiments.coordinator import check_devices, open_study, run_sweep
        from ctcgrpo.experiments.picture import drawn
        from ctcgrpo.experiments.table import all_equal, curves_by_environment, printed, table_of
    except ImportError as error:
        raise RecipeError(f"sweeping needs the extra sweep: {installing('sweep')} ({error})") from None
    check_devices(workers, devices or [])
    console = Terminal(168 if spec.variants else 140)
    label = name or spec.name or file.stem
    if not NAME.fullmatch(label):
        raise RecipeError(f"--name {label!r}; expected letters, digits, dots, - and _ (64 at most): it names a folder")
    folder = out / label
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

    log_line = functools.partial(print_line, console)
    rows = run_sweep(spec, recipe, folder, workers=workers, devices=devices or [], extra=overrides or [], log_line=log_line)
    shutil.copyfile(file, folder / "sweep.yaml")
    if spec.variants:
        reference = against or spec.baseline
        shown = rows if reference == spec.baseline else table_of(spec, open_study(spec, folder), folder, reference)
        for environment in spec.environments:
            of_it = [row for row in shown if row["params"]["environment"] == environment]
            title = f"{environment}: gains in held-out score, 95 % intervals over seeds; primary: {spec.primary}"
            console.print(printed(of_it, title, spec.primary, reference))
        if curves := curves_by_environment(spec, rows, folder):
            (folder / "curves.svg").write_bytes(drawn(curves, str(spec.baseline)))
            log_line(f"table and curves: {folder / 'table.json'}, {folder / 'curves.svg'}")
    else:
        console.print(printed(rows, f"sweep {folder.name}: held-out score after training"))
    if all_equal(rows):
        log_line("all trials have the same score, so there is no best one; try more steps, or a wider range of values")
    elif (folder / "best").exists() and not spec.variants:
        log_line(f"best checkpoint: {folder / 'best'}")
    if failed := [row["trial"] for row in rows if row["state"] in ("failed", "damaged")]:
        raise RunFailed(
            f"{len(failed)} of {len(rows)} trials failed ({', '.join(failed[:3])}{', ...' * (len(failed) > 3)}); the "
            f"logs in {folder} have the reasons; the same command re-runs them"
        )
