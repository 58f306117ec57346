"""Finding and reading a config file."""

from pathlib import Path

from coterie.core.errors import UserError, nearest

SHIPPED = Path(__file__).resolve().parent.parent / "configs"
"""In a checkout and installed alike."""

DYNAMICS = SHIPPED / "dynamics"
"""Those of ``coterie dynamics``."""

_LARGEST = 1 << 20


def shipped_names(folder: Path = SHIPPED) -> list[str]:
    """The configs that come with coterie, of one kind: those in ``folder``."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def find(name: str | Path, shipped: Path = SHIPPED) -> Path:
    """The file that ``name`` stands for: a path, or the bare name of a config in ``shipped``.

    Raises:
        UserError: there is none, or it is no file.
    """
    path = Path(name)
    if str(name) in shipped_names(shipped):
        return _short(shipped / f"{name}.yaml")
    if path.is_dir():
        inside = sorted(file.name for file in path.glob("*.yaml"))[:5]
        hint = f" inside it, such as {', '.join(inside)}" if inside else ""
        raise UserError(f"{path}: is a directory; give a YAML file{hint}")
    if path.is_file():
        return path
    if path.exists():
        raise UserError(f"{path}: is not a regular file; give a YAML file")
    if len(path.parts) == 1 and path.suffix not in (".yaml", ".yml"):
        known = shipped_names(shipped)
        raise UserError(
            f"there is no config '{name}', shipped ones are {', '.join(known)}"
            f"{nearest(str(name), known)}"
        )
    near = [*(str(file) for file in path.parent.glob("*.y*ml")), *shipped_names(shipped)]
    raise UserError(f"{path}: there is no such file{nearest(str(path), near)}")


def read_text(file: Path) -> str:
    """The text of ``file``.

    Raises:
        UserError: it cannot be read, is not UTF-8, or is too large to be a config.
    """
    try:
        if (size := file.stat().st_size) > _LARGEST:
            raise UserError(f"{file}: is {size} bytes long, too much for a config")
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error


def _short(path: Path) -> Path:
    """Relative to the working directory when inside it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
