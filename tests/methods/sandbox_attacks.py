# SPDX-License-Identifier: Apache-2.0
"""What a hostile program may try. Each sets ``done`` to whether it got its way; what is seen instead stands beside it.

Names in capitals are filled in: SECRET a file, FOLDER its folder (anybody may write there), PORT and DATAGRAM of
listeners on this machine, SOCKET of one in the file system, PID of this process, LEFT_OPEN a descriptor of SECRET in
it. Its environment has a HIDDEN variable with the value "hidden words".
"""

DENIED = "PermissionError|OSError"
NOBODY = "ProcessLookupError|PermissionError"
FALSE = "wrong result"
CALL = "import ctypes, os\nl = ctypes.CDLL(None, use_errno=True)\n"

ATTACKS = {
    # Files outside the program's folder.
    "read": ("done = open('SECRET').read()", DENIED),
    "read_a_system_file": ("done = open('/etc/passwd').read()", DENIED),
    "read_by_descriptor": ("import os; done = os.open('SECRET', os.O_RDONLY)", DENIED),
    "list": ("import os; done = os.listdir('FOLDER')", DENIED),
    "climb": ("done = open('../' * 9 + 'etc/passwd').read()", DENIED),
    "write": ("done = open('SECRET', 'w')", DENIED),
    "append": ("done = open('SECRET', 'a')", DENIED),
    "create": ("done = open('FOLDER/new', 'w')", DENIED),
    "make_a_folder": ("import os; os.mkdir('FOLDER/new'); done = True", DENIED),
    "make_a_pipe": ("import os; os.mkfifo('FOLDER/new'); done = True", DENIED),
    "truncate": ("import os; os.truncate('SECRET', 0); done = True", DENIED),
    "delete": ("import os; os.unlink('SECRET'); done = True", DENIED),
    "replace": ("import os; open('a', 'w'); os.rename('a', 'SECRET'); done = True", DENIED),
    "move_in": ("import os; os.rename('SECRET', 'a'); done = open('a').read()", DENIED),
    "mode": ("import os; os.chmod('SECRET', 0o777); done = True", DENIED),
    "mode_of_a_readable_file": ("import os; os.fchmod(os.open(os.__file__, 0), 0o600); done = True", DENIED),
    "owner": ("import os; os.chown('SECRET', 12345, 12345); done = True", DENIED),
    "times": ("import os; os.utime('SECRET', (1, 1)); done = True", DENIED),
    "extended_attribute": ("import os; os.setxattr('SECRET', 'user.x', b'1'); done = True", DENIED),
    "run_a_program": ("import os; os.execv('/bin/sh', ['sh', '-c', 'echo'])", DENIED),
    "shared_memory": ("done = open('/dev/shm/tenfold-test', 'w')", DENIED),
    "memory_file": ("import os; done = os.memfd_create('x')", DENIED),
    # Links.
    "symbolic_link": ("import os; os.symlink('SECRET', 'a'); done = open('a').read()", DENIED),
    "write_by_symbolic_link": ("import os; os.symlink('SECRET', 'a'); done = open('a', 'w')", DENIED),
    "link_to_the_root": ("import os; os.symlink('/', 'a'); done = os.listdir('a')", DENIED),
    "hard_link": ("import os; os.link('SECRET', 'a'); done = open('a').read()", DENIED),
    "folder_turned_into_a_link": (
        "import os\nos.mkdir('d'); os.rmdir('d'); os.symlink('FOLDER', 'd')\ndone = open('d/new', 'w')", DENIED),
    # /proc.
    "environment_of_a_process": ("done = open('/proc/PID/environ').read()", DENIED),
    "memory_of_a_process": ("done = open('/proc/PID/mem', 'rb')", DENIED),
    "program_of_a_process": ("import os; done = os.readlink('/proc/PID/exe')", DENIED),
    "root_of_a_process": ("done = open('/proc/PID/rootSECRET').read()", DENIED),
    "descriptor_of_a_process": ("done = open('/proc/PID/fd/LEFT_OPEN').read()", DENIED),
    "own_root": ("done = open('/proc/self/rootSECRET').read()", DENIED),
    "own_folder_and_up": ("done = open('/proc/self/cwd/' + '../' * 12 + 'SECRET').read()", DENIED),
    "own_memory": ("done = open('/proc/self/mem', 'wb')", DENIED),
    "kernel_settings": ("done = open('/proc/sys/kernel/core_pattern', 'w')", DENIED),
    "own_input_for_writing": ("done = open('/proc/self/fd/0', 'r+b')", DENIED + "|UnsupportedOperation"),
    # Network.
    "tcp": ("import socket; done = socket.create_connection(('127.0.0.1', PORT), 1)", DENIED),
    "tcp6": ("import socket; done = socket.socket(socket.AF_INET6)", DENIED),
    "udp": (
        "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "done = s.sendto(b'x', ('127.0.0.1', DATAGRAM))", DENIED),
    "unix": ("import socket\ns = socket.socket(socket.AF_UNIX); s.connect('SOCKET'); done = True", DENIED),
    "raw": ("import socket; done = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", DENIED),
    "dns": ("import socket; done = socket.gethostbyname('example.org')", "an error of its own|" + DENIED),
    "http": ("import urllib.request as u; done = u.urlopen('http://127.0.0.1:PORT', timeout=1)",
             "an error of its own|" + DENIED),
    "listen": ("import socket; done = socket.create_server(('127.0.0.1', 0))", DENIED),
    "io_uring": (CALL + "done = l.syscall(425, 1, 0) >= 0", FALSE),
    # Signals and other processes.
    "kill_this_process": ("import os; os.kill(PID, 9); done = True", NOBODY),
    "stop_this_process": ("import os, signal; os.kill(PID, signal.SIGSTOP); done = True", NOBODY),
    "kill_the_parent": ("import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(.1)\ndone = os.getppid() == 1", None),
    "kill_the_group": ("import os; os.kill(0, 9)", None),
    "kill_everybody": ("import os; os.kill(-1, 9); done = True", NOBODY),
    "limit_this_process": (
        "import resource; resource.prlimit(PID, resource.RLIMIT_CPU, (0, 0)); done = True", NOBODY),
    "trace": (CALL + "done = l.ptrace(16, PID, 0, 0) == 0", FALSE),
    "read_memory": (CALL + "b = ctypes.create_string_buffer(64)\n"
                    "done = l.syscall(310, PID, b, 1, b, 1, 0) >= 0", FALSE),
    "open_a_process": (CALL + "p = l.syscall(434, PID, 0)\n"
                       "done = p >= 0 and l.syscall(438, p, LEFT_OPEN, 0) >= 0", FALSE),
    "new_namespace": (CALL + "done = l.unshare(0x10000000) == 0", FALSE),
    "mount": (CALL + "done = l.mount(b'x', b'.', b'tmpfs', 0, None) == 0", FALSE),
    "privileges": ("import os; os.setuid(0); os.setgid(0); done = open('/etc/shadow').read()", DENIED),
    # State of this process.
    "environment": ("import os; done = 'HIDDEN' in os.environ or len(os.environ) > 3", FALSE),
    "descriptors": (
        "import os\ndone = False\nfor n in range(3, 256):\n    try: done |= b'the secret' in os.pread(n, 99, 0)\n"
        "    except OSError: pass", FALSE),
    "modules": ("import sys; done = {'tenfold', 'torch', 'pytest', 'jail_keeper'} & set(sys.modules)", FALSE),
    "import_us": ("import tenfold; done = True", "ModuleNotFoundError"),
    "import_the_jail": ("import jail_linux; done = True", "ModuleNotFoundError"),
    "objects": (
        "import gc\ndone = any('hidden' + ' words' in repr(o) for o in gc.get_objects() if type(o) is dict)", FALSE),
    # Reports of its own.
    "half_a_character": ("raise ValueError('\\udc80')", "ValueError"),
    "forged_report": (
        "import os\nfor n in range(3, 40):\n"
        "    try: os.write(n, b'{\"kind\": \"done\", \"nonce\": \"0\", \"broken\": \"x\"}')\n"
        "    except OSError: pass\nos._exit(0)", None),
    "strange_report": (
        "import os\nfor n in range(3, 40):\n    try: os.write(n, b'{\"kind\": [1], \"error\": {}}')\n"
        "    except OSError: pass\nos._exit(0)", None),
    "crash": ("import ctypes; ctypes.string_at(1)", None),
    "leave": ("import os; os._exit(0)", None),
    "deep_folders": ("import os\nfor i in range(100): os.mkdir('d'); os.chdir('d')\ndone = False", None),
    "deep_expression": ("done = " + "(" * 5000 + "1" + ")" * 5000, "SyntaxError|MemoryError|RecursionError"),
    "recursion": ("def f(): f()\nf()", "RecursionError"),
}  # fmt: skip

BOMBS = {
    "memory": ("done = bytearray(4 << 30)", "MemoryError"),
    "memory_bit_by_bit": ("x = []\nwhile True: x.append(bytearray(1 << 20))", "MemoryError"),
    "output": ("while True: print('x' * 10000)", "too much output"),
    "errors": ("import sys\nwhile True: print('x' * 10000, file=sys.stderr)", "too much output"),
    "large_file": ("done = open('a', 'wb').write(bytes(100 << 20))", "MemoryError|OSError"),
    "loop": ("while True: pass", "out of time"),
    "wait_and_ignore_signals": (
        "import signal, time\nfor s in (15, 24, 2, 1): signal.signal(s, signal.SIG_IGN)\ntime.sleep(60)",
        "out of time"),
    "sleep": ("import time; time.sleep(60)", "out of time"),
    "wait_for_itself": ("import os; os.read(os.pipe()[0], 1)", "out of time"),
    "forks": ("import os, time\nwhile True:\n    try: os.fork()\n    except OSError: time.sleep(.1)", "out of time"),
    "threads": (
        "import threading, time\nn = 0\ntry:\n    while n < 500:\n"
        "        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1\n"
        "except RuntimeError: pass\ndone = n == 500", "wrong result|MemoryError|out of time"),
}  # fmt: skip
