"""`python -m manual`: write the generated pages; with `plans`, first plan what the decision page is made from."""

import sys

from manual import choice, method_page, plans


def main() -> None:
    if sys.argv[1:] == ["plans"]:
        plans.make()
    for path, text in {**method_page.pages(), choice.PAGE: choice.page()}.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")


main()
