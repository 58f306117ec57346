"""``coterie data build``, ``inspect`` and ``verify``."""

from pathlib import Path
from typing import Annotated

import typer

Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="A dataset's folder.")]


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    commands = typer.Typer(no_args_is_help=True)
    commands.command(epilog="Example:  coterie data build ~/papers /data/papers --sequence 1024")(
        build
    )
    commands.command(epilog="Example:  coterie data inspect /data/papers")(inspect)
    commands.command(epilog="Example:  coterie data verify /data/papers")(verify)
    app.add_typer(commands, name="data", help="Make datasets from text and images; look at them.")


def build(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A folder of text files and images.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to make.")],
    sequence: Annotated[
        int, typer.Option(min=8, max=1 << 20, help="Tokens a model sees at once: data.sequence.")
    ] = 256,
    held_out: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="The share of files kept out of training.")
    ] = 0.1,
    side: Annotated[int, typer.Option(min=1, max=1024, help="Pixels of an image's side.")] = 8,
    levels: Annotated[int, typer.Option(min=2, max=65276, help="Grey levels of a pixel.")] = 17,
    replace: Annotated[
        bool, typer.Option("--replace", help="Put it in the place of a dataset at OUT.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Pass over files that cannot be read.")
    ] = False,
) -> None:
    """Make a dataset from a folder of text files and images, for data.path of a config.

    Each file is a document. An image's caption is its name: 'a-red-fox.png' is 'a red fox'.
    """
    from rich.console import Console
    from rich.progress import Progress

    from coterie.data import Vocabulary, build_directory

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("files", total=None)
        built = build_directory(
            source,
            out,
            sequence=sequence,
            vocabulary=Vocabulary(levels=levels, side=side),
            fraction=held_out,
            replace=replace,
            skip_bad=skip_bad,
            progress=lambda done, total, _: bar.update(task, completed=done, total=total),
        )
    for sentence in built.skipped:
        console.print(f"skipped {sentence}", markup=False, highlight=False, soft_wrap=True)
    if built.ignored:
        console.print(f"{built.ignored} files of other kinds were left out", highlight=False)
    inspect(out)


def inspect(directory: Dataset) -> None:
    """Show what a dataset holds."""
    from coterie.data.manifest import read_manifest

    manifest = read_manifest(directory)
    vocabulary = manifest.vocabulary
    print(f"{directory}: {manifest.fingerprint[:16]}")
    print(
        f"  sequence {manifest.sequence}, vocabulary {vocabulary.size} (bytes, {vocabulary.levels} "
        f"grey levels, 4 markers), images {vocabulary.side}×{vocabulary.side}"
    )
    for name, split in manifest.splits.items():
        padding = 1 - split.tokens / (split.rows * (manifest.sequence + 1))
        print(
            f"  {name}: {split.documents:,} documents, {split.tokens:,} tokens "
            f"({split.image_tokens / max(1, split.tokens):.0%} image), {split.rows:,} rows "
            f"({padding:.0%} padding), {len(split.shards)} files"
        )


def verify(directory: Dataset) -> None:
    """Read a whole dataset and compare every checksum."""
    from coterie.data import open_dataset
    from coterie.data.manifest import read_manifest

    for name in read_manifest(directory).splits:
        open_dataset(directory, name).verify()
        print(f"{directory}: {name} is as it was built")
