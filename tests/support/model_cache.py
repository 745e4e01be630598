"""A cache of models in a folder of the test."""

CONTENT = bytes(range(256)) * 256


def visible(folder):
    """The files that lie where models lie."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not path.relative_to(folder).parts[0].startswith(".")
    )


def put(cache, name, content=CONTENT):
    path = cache / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
