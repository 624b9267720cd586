"""Where the numbers of a run go: files always, a console if there is one."""
