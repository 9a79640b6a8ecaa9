"""Names of files as text that every output can hold."""


def display_name(path: str) -> str:
    r"""Return a path as it is printed and written to files.

    Python keeps the bytes of a file name that are not UTF-8 as lone surrogates, which UTF-8 cannot encode. They become
    escapes such as `\udce9`.
    """
    return path.encode("utf-8", "backslashreplace").decode("utf-8")
