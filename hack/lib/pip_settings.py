"""Writes how this machine's pip reaches its index to FOLDER/pip.conf and FOLDER/ca.crt, for use inside an image build.

The settings come from pip's own sources, in pip's order: its configuration files, then PIP_* variables. Only settings
that mean the same inside the build are taken; paths of this machine are not, except for the certificates' content.
"""

import configparser
import os
import shutil
import sys
from pathlib import Path

PORTABLE = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "default-timeout", "retries")
CERTIFICATES_IN_BUILD = "/run/secrets/ca.crt"


def settings() -> dict[str, str]:
    home = Path.home()
    files = ["/etc/xdg/pip/pip.conf", "/etc/pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf"]
    files.append(os.environ.get("PIP_CONFIG_FILE", os.devnull))
    parser = configparser.RawConfigParser()
    parser.read(files)
    found = {}
    for section in ("global", "install"):
        if parser.has_section(section):
            found.update(parser.items(section))
    found.update((k[4:].lower().replace("_", "-"), v) for k, v in os.environ.items() if k.startswith("PIP_"))
    return found


def main(folder: Path) -> None:
    found = settings()
    lines = [f"{key} = {value}" for key, value in found.items() if key in PORTABLE]
    candidates = [found.get("cert"), os.environ.get("SSL_CERT_FILE"), os.environ.get("REQUESTS_CA_BUNDLE")]
    certificates = next((Path(c) for c in candidates if c and Path(c).is_file()), None)
    if certificates:
        shutil.copyfile(certificates, folder / "ca.crt")
        lines.append(f"cert = {CERTIFICATES_IN_BUILD}")
    else:
        (folder / "ca.crt").touch()
    (folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))


main(Path(sys.argv[1]))
