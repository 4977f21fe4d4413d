"""``fedsplit deploy``: Flower's own commands for a topology, printed or started on this machine."""

import json
import os
import shlex
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console

from fedsplit.errors import FedsplitError, require
from fedsplit.flower import LinkSettings
from fedsplit.flower.link_settings import NODE
from fedsplit.mapping import from_mapping

from ..config import load_config
from ..link_config import link_settings
from ..run_settings import run_settings
from .flower_tools import end, is_up, newest_run, spawn, tool, write_app
from .guard import Guard
from .surroundings import environment

CONNECTION = "deployed"
_START_S = 60.0
_COMPLETED = "finished:completed"


@dataclass(frozen=True)
class Address:
    """Where a server of the link listens, and what others dial (`fedsplit.flower.LinkSettings`)."""

    bind: str
    advertise: str | None = None


@dataclass(frozen=True)
class Certificates:
    """PEM files; ``{node}`` in a path stands for ``server``, ``edge-0``, ``device-0``, ...

    Parameters
    ----------
    root : str
        Signed all others.
    certificate, key : str
        Of each node. The server's serve Flower's SuperLink as well.
    login : str or None
        Private key with which a SuperNode logs in at the SuperLink, its public key beside it with
        ``.pub``: a node is who its key says (``link.login``). None turns Flower's node
        authentication off.
    mutual : bool
        Whether devices and edges prove themselves on the link too.
    """

    root: str
    certificate: str
    key: str
    login: str | None = None
    mutual: bool = True


@dataclass(frozen=True)
class Topology:
    """Who runs where.

    Parameters
    ----------
    superlink : str
        ``host:port`` of Flower's SuperLink, as nodes and users reach it.
    link : Address
        The server's end of the link.
    edges : tuple of Address
        Edge servers; none for two-tier schemes.
    devices : int
        How many.
    certificates : Certificates or None
        None leaves everything in the clear, for trials on one machine.
    node_ports : int
        SuperNode i listens on port ``node_ports + i`` of its own machine's loopback for its apps.
    data : str or None
        With ``data.partition=local``, each device's own file or folder on its own machine;
        ``{node}`` in it stands for ``device-0``, ... The server is not told.
    sites : tuple of str
        Names of the devices, for turns.csv; none, or one for each.
    folder : str
        Where Flower's app and settings for this topology are written, and logs.
    overrides : tuple of str
        What to run, as for ``fedsplit run``.
    """

    superlink: str
    link: Address
    devices: int
    edges: tuple[Address, ...] = ()
    certificates: Certificates | None = None
    node_ports: int = 9100
    data: str | None = None
    sites: tuple[str, ...] = ()
    folder: str = "deployment"
    overrides: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        host, _, port = self.superlink.rpartition(":")
        require(bool(host) and port.isdecimal(), "superlink", self.superlink, "host:port")
        require(self.devices >= 1, "devices", self.devices, "at least 1")
        named, allowed = len(self.sites), f"none, or one for each of devices={self.devices}"
        require(named in (0, self.devices), "sites", list(self.sites), allowed)
        for name, address in (("link", self.link), *(("edges", edge) for edge in self.edges)):
            try:
                LinkSettings(address.bind, address.advertise)
            except FedsplitError as error:
                raise FedsplitError(f"{name}: {error}") from error

    def nodes(self) -> tuple[str, ...]:
        """Return the names of the nodes: edges, then devices."""
        edges = (f"edge-{index}" for index in range(len(self.edges)))
        return (*edges, *(f"device-{index}" for index in range(self.devices)))

    def file(self, field_name: str, node: str) -> str:
        """Return the absolute path of a file of `certificates` for `node`."""
        pattern: str = getattr(self.certificates, field_name)
        return str(Path(pattern.replace(NODE, node)).resolve())


def read_topology(file: Path) -> Topology:
    """Read a topology file.

    Raises
    ------
    FedsplitError
        If it cannot be read, or a field is wrong.
    """
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise FedsplitError(f"topology={str(file)!r}: cannot be read ({error})") from error
    require(isinstance(values, dict), "topology", str(file), "a YAML mapping")
    return from_mapping(Topology, values, str(file))


def superlink_command(topology: Topology) -> list[str]:
    """Return the command of the SuperLink."""
    host, _, port = topology.superlink.rpartition(":")
    command = ["flower-superlink", "--host", host, "--port", port]
    if topology.certificates is None:
        return [*command, "--insecure"]
    command += ["--ssl-ca-certfile", topology.file("root", "server")]
    command += ["--ssl-certfile", topology.file("certificate", "server")]
    command += ["--ssl-keyfile", topology.file("key", "server")]
    if topology.certificates.login is not None:
        command.append("--enable-supernode-auth")
    return command


def register_commands(topology: Topology) -> list[list[str]]:
    """Return the commands that make the nodes known to a SuperLink that authenticates them."""
    if topology.certificates is None or topology.certificates.login is None:
        return []
    return [
        ["flwr", "supernode", "register", f"{topology.file('login', node)}.pub", CONNECTION]
        for node in topology.nodes()
    ]


def supernode_command(topology: Topology, node: str) -> list[str]:
    """Return the command of one SuperNode, to be run on its machine."""
    role, _, number = node.partition("-")
    index = int(number)
    settings: dict[str, str | int] = {"role": role}
    if role == "edge":
        address = topology.edges[index]
        settings |= {"edge-id": index, "bind": address.bind}
        if address.advertise is not None:
            settings["advertise"] = address.advertise
    else:
        settings |= {"partition-id": index, "num-partitions": topology.devices}
        if topology.data is not None:
            settings["data-path"] = str(Path(topology.data.replace("{node}", node)).resolve())
        if topology.sites:
            settings["site"] = topology.sites[index]
    port = topology.node_ports + topology.nodes().index(node)
    command = ["flower-supernode", "--superlink", topology.superlink, "--port", str(port)]
    if topology.certificates is None:
        command.append("--insecure")
    else:
        command += ["--root-certificates", topology.file("root", node)]
        settings["link-root"] = topology.file("root", node)
        if topology.certificates.mutual or role == "edge":
            settings["link-certificate"] = topology.file("certificate", node)
            settings["link-key"] = topology.file("key", node)
        if topology.certificates.login is not None:
            command += ["--auth-supernode-private-key", topology.file("login", node)]
    config = " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())
    return [*command, "--node-config", config]


def run_command(topology: Topology, output: Path | None = None) -> list[str]:
    """Return the command that starts the run, and shows its log to the end."""
    settings = f"hydra={json.dumps(shlex.join(overrides(topology)))}"
    if output is not None:
        settings += f" output={json.dumps(str(output))}"
    app = str(_folder(topology) / "app")
    return ["flwr", "run", app, CONNECTION, "--stream", "--run-config", settings]


def overrides(topology: Topology) -> list[str]:
    """Return what is to be run, with what the topology says about it."""
    chosen = [
        *topology.overrides,
        f"fleet.devices={topology.devices}",
        f"link.bind={topology.link.bind}",
    ]
    if topology.edges:
        chosen += ["run.edge_nodes=true", f"fleet.edges={len(topology.edges)}"]
    if topology.link.advertise is not None:
        chosen.append(f"link.advertise={topology.link.advertise}")
    if topology.certificates is not None:
        fields = ("certificate", "key", *(["root"] if topology.certificates.mutual else []))
        chosen += [f"link.{name}={topology.file(name, 'server')}" for name in fields]
        if topology.certificates.login is not None:
            chosen.append(f"link.login={topology.file('login', NODE)}.pub")
    return chosen


def deploy(file: Path, start: bool, console: Console, output: Path | None = None) -> int:
    """Print the commands for a topology, or start them here and run; return the exit code.

    Raises
    ------
    FedsplitError
        If the topology or the configuration of its run is wrong, or a process does not start.
    """
    topology = read_topology(file)
    config = load_config(overrides(topology))
    run_settings(config)
    link_settings(config)
    folder = _folder(topology)
    write_app(folder / "app")
    (folder / "flower").mkdir(exist_ok=True)
    (folder / "flower" / "config.toml").write_text(_connection(topology))
    if start:
        return _start(topology, console, output)
    _print(topology, console, output)
    return 0


def _print(topology: Topology, console: Console, output: Path | None) -> None:
    def show(title: str, *commands: list[str]) -> None:
        console.print(f"# {title}", highlight=False, soft_wrap=True)
        for command in commands:
            console.print(shlex.join(command), highlight=False, markup=False, soft_wrap=True)
        console.print()

    home = f"FLWR_HOME={_folder(topology) / 'flower'}"
    show("on every machine", ["export", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1"])
    show("the cloud", superlink_command(topology))
    where = ["export", home]
    if registering := register_commands(topology):
        show("where runs are started: make the nodes known", where, *registering)
    for node in topology.nodes():
        show(node, supernode_command(topology, node))
    show("where runs are started", where, run_command(topology, output))


def _start(topology: Topology, console: Console, output: Path | None) -> int:
    folder = _folder(topology)
    host, _, port = topology.superlink.rpartition(":")
    with Guard() as guard, ExitStack() as stack:
        variables = {**environment(folder / "flower"), "PWD": str(folder), **guard.mark}

        # Processes are stopped in the order in which they depend on one another.
        def launch(name: str, command: list[str]) -> subprocess.Popen[bytes]:
            log = stack.enter_context((folder / f"{name}.log").open("ab"))
            process = spawn([*tool(command[0]), *command[1:]], variables, folder, log)
            stack.callback(end, process)
            console.print(f"{name}: process {process.pid}", highlight=False)
            return process

        superlink = launch("superlink", superlink_command(topology))
        if not is_up((host, int(port)), superlink, _START_S):
            raise FedsplitError(f"Flower's SuperLink did not start; see {folder}/superlink.log")
        for command in register_commands(topology):
            _call(command, variables, folder)
        for node in topology.nodes():
            launch(node, supernode_command(topology, node))
        run = launch("run", run_command(topology, output))
        run.wait()
        status, details = newest_run(variables, folder, [CONNECTION])
    console.print(f"{status} {details}".rstrip(), highlight=False, markup=False)
    return 0 if status == _COMPLETED else 1


def _call(command: list[str], variables: dict[str, str], folder: Path) -> None:
    done = subprocess.run(
        [*tool(command[0]), *command[1:]],
        env=variables,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise FedsplitError(f"{shlex.join(command)}: {(done.stderr or done.stdout).strip()}")


def _connection(topology: Topology) -> str:
    lines = [f"[superlink.{CONNECTION}]", f"address = {json.dumps(topology.superlink)}"]
    if topology.certificates is None:
        lines.append("insecure = true")
    else:
        lines.append(f"root-certificates = {json.dumps(topology.file('root', 'server'))}")
    return "\n".join(["[superlink]", f'default = "{CONNECTION}"', "", *lines, ""])


def _folder(topology: Topology) -> Path:
    return Path(os.path.abspath(topology.folder))
