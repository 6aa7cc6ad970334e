"""Files that are written only if they have changed."""

written = set()  # the files of this time


def write(path, content):
    "Write a file, unless it is so already: what has not changed is not built again."
    content = content.encode() if isinstance(content, str) else content
    written.add(path)
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
