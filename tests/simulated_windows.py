"""Run srpkd without what Windows does not have, as far as Linux can pretend.

    python tests/simulated_windows.py FOLDER

Modules, functions and signals that Windows lacks are hidden, processes are spawned, and open files can be neither
replaced nor deleted. The libraries are imported before, since they find out about the system when they are imported.
The rest of Windows, such as backslashes in paths, is not simulated. Processes that load images or check a backend
import this file again, and thereby run under the same conditions.
"""

import errno
import fcntl
import importlib
import multiprocessing
import os
import pkgutil
import shutil
import signal
import stat
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

# imported before the simulation starts; the processes of a loader need only some
LIBRARIES = [
    *("multiprocessing.popen_spawn_posix", "multiprocessing.queues", "multiprocessing.resource_tracker"),
    *("multiprocessing.synchronize", "torch.utils.data", "torchvision.transforms.v2"),
]
if __name__ == "__main__":
    LIBRARIES += ["filelock", "jinja2", "jsonargparse", "matplotlib.figure", "torch.export._trace"]
MISSING = {
    "sys": (),
    "os": (
        *("fork", "forkpty", "register_at_fork", "kill", "killpg", "getpgid", "setsid", "wait", "WNOHANG", "uname"),
        *("sched_getaffinity", "sched_setaffinity", "sysconf", "getuid", "geteuid", "getgid", "getloadavg", "nice"),
        *("chown", "fchmod", "fchown", "mkfifo", "mknod", "statvfs", "sync", "pipe2", "posix_fallocate", "sendfile"),
        *("O_NONBLOCK", "O_NOFOLLOW", "O_DIRECTORY", "O_CLOEXEC", "O_SYNC", "pread", "pwrite", "ttyname"),
    ),
    "signal": (
        *("SIGHUP", "SIGKILL", "SIGALRM", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGCONT"),
        *("alarm", "setitimer", "pause", "pthread_sigmask", "pthread_kill", "sigwait", "siginterrupt", "SIG_BLOCK"),
    ),
}
MODULES = ("fcntl", "pwd", "grp", "resource", "termios", "tty", "pty", "triton")  # triton: there is none for Windows
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV)


def simulate() -> None:
    """Change this process; srpkd is not imported yet."""
    for library in LIBRARIES:
        importlib.import_module(library)
    flock, set_handler = fcntl.flock, signal.signal

    def locking(descriptor: int, mode: int, size: int) -> None:
        assert stat.S_ISREG(os.fstat(descriptor).st_mode), "a folder cannot be opened"
        try:
            flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PermissionError(errno.EACCES, "Permission denied") from error

    def set_windows_handler(number: int, handler: Any) -> Any:
        if number not in SIGNALS:
            raise ValueError("invalid signal value")
        return set_handler(number, handler)

    for name, missing in MISSING.items():
        limited = types.ModuleType(name)
        limited.__dict__.update({key: value for key, value in vars(sys.modules[name]).items() if key not in missing})
        sys.modules[name] = limited
    sys.modules["sys"].__dict__.update(platform="win32")
    sys.modules["signal"].__dict__.update(SIGBREAK=signal.SIGUSR1, signal=set_windows_handler)
    sys.modules["os"].__dict__.update(kill=lambda *_: os._exit(1))
    sys.modules |= dict.fromkeys(MODULES)  # None makes an import fail
    sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    for module in (os, sys.modules["os"]):
        for name in ("replace", "rename", "remove", "unlink"):
            setattr(module, name, refusing_open_files(getattr(os, name)))
    shutil._use_fd_functions = False  # so that it calls os.unlink with whole paths
    tempfile.NamedTemporaryFile = None  # no other process can open it
    multiprocessing.set_start_method("spawn", force=True)
    warnings.filterwarnings("error", category=EncodingWarning, module=r"srpkd\b")
    os.environ["SRPKD_BUILD_CUDA"] = "0"


def refusing_open_files(function: Callable) -> Callable:
    def checked(*paths: str | os.PathLike, **options: Any) -> None:
        opened = set()
        for descriptor in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                opened.add(os.readlink(f"/proc/self/fd/{descriptor}"))
        if any(os.path.realpath(path) in opened for path in paths):
            raise PermissionError(errno.EACCES, "it is being used by another process", str(paths[0]))
        return function(*paths, **options)

    return checked


def modules() -> list[str]:
    """Import every module of srpkd, and return their names."""
    import srpkd

    found = ["srpkd", *(module.name for module in pkgutil.walk_packages(srpkd.__path__, "srpkd."))]
    return [importlib.import_module(name).__name__ for name in found if not name.endswith("._native")]


def main(folder: Path) -> None:
    os.chdir(folder)
    names = modules()
    print(f"imported {len(names)} modules", flush=True)
    print("srpkd.kernels.triton.tiles" in names, flush=True)

    from srpkd import cli, train
    from srpkd.data.synthetic import write_synthetic
    from srpkd.training.folder_lock import FolderLock
    from srpkd.training.objectives import CycleGAN

    take_step = CycleGAN.step
    steps = 0

    def step(self: CycleGAN, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            try:
                FolderLock(Path("runs/run"))
            except ValueError as error:
                print(error)
            signal.raise_signal(signal.SIGINT)
        return take_step(self, batch)

    CycleGAN.step = step
    images = write_synthetic(folder / "images", 5, 2, 20, layout="unaligned")
    options = "--netG resnet_1blocks --ngf 2 --ndf 2 --netD n_layers --n_layers_D 1 --load_size 18 --crop_size 16"
    options += " --epoch_steps 4 --n_epochs 1 --n_epochs_decay 0 --num_threads 1 --device cpu --name run"
    try:
        train.main([f"--dataroot={images}", *options.split()])
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    train.main(["--resume", "run"])
    network = "runs/run/latest_net_G_A.pth"
    for command in (
        ["info"],
        ["report", "runs/run"],
        ["translate", network, str(images / "testA"), "out"],
        ["evaluate", "out", str(images / "testA"), "--metrics", "psnr", "--json", "scores.json"],
        ["export", network, "--format", "pt2"],
        ["check", "--device", "cpu", "--backend", "blocked"],
    ):
        try:
            print("---", *command, flush=True)
            cli.main(command)
        except SystemExit as end:
            if end.code:
                raise


simulate()
if __name__ == "__main__":
    main(Path(sys.argv[1]))
