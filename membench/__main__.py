"""`python -m membench`."""

from membench.paths import leave_out_current_folder

leave_out_current_folder()  # before anything else is imported

from membench.cli import main  # noqa: E402

main()
