"""`python -m membench`."""

from membench.paths import put_current_folder_last

put_current_folder_last()  # before anything else is imported

from membench.cli import main  # noqa: E402

main()
