"""What pyproject.toml cannot say: the annotated settings file of config/ goes into the package as well.

`pd-proxy config --default` prints it, so it must be there after an installation; and it is kept once.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

_NAME = "pd-proxy.yaml"


class Build(build_py):
    """Builds the package with the settings file in it. In an editable installation it is read where it is."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib) / "pd_proxy"
            self.mkpath(str(target))
            self.copy_file(str(Path("config") / _NAME), str(target / _NAME))

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), f"config/{_NAME}"]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / "pd_proxy" / _NAME)]


setup(cmdclass={"build_py": Build})
