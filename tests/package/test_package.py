"""The list of packages in pyproject.toml, which setuptools takes as it stands, names every folder of the library."""

import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def test_every_package_is_listed(repository):
    setup = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent for path in (repository / "modeling_sslam").rglob("*.py")}
    names = {".".join(path.relative_to(repository).parts) for path in folders}
    mapped = setup["package-dir"]
    assert sorted(setup["packages"]) == setup["packages"]
    assert set(setup["packages"]) == names | set(mapped)
    for name, folder in mapped.items():
        assert (repository / folder / "__init__.py").is_file(), name
        # A folder inside it would be a package of its own.
        assert not list((repository / folder).glob("*/*.py"))


def test_every_data_file_is_listed(repository):
    setup = tomllib.loads((repository / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = {
        path
        for package, patterns in setup["package-data"].items()
        for pattern in patterns
        for path in (repository / package.replace(".", "/")).glob(pattern)
    }
    data = {
        path
        for path in (repository / "modeling_sslam").rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert data == listed
