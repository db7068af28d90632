"""The site: chapters from nbs/, pages from this folder, nothing from the network when it is read."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent)]

import llamba_ref  # noqa: E402

project, author, copyright = "llamba_ref", "The llamba_ref authors", "2026, the llamba_ref authors"
version = release = llamba_ref.__version__
repository = "https://github.com/llamba-ref/llamba_ref"

extensions = [
    "chapters",  # before myst_nb: it writes the pages that myst_nb reads
    "docments",
    "moving",  # loads the script of moving pictures where there is one
    "write_models",  # a script with the weights of the page that writes
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_togglebutton",
    "sphinx_proof",
    "sphinx_exercise",
    "sphinx_multitoc_numbering",
    "sphinxcontrib.bibtex",
]
exclude_patterns = ["_build", "_static", "nbs/_*"]

nb_execution_mode = "off"  # the notebooks come with their outputs
nb_merge_streams = True
nb_ipywidgets_js = {}  # else every page asks a CDN for widgets that no chapter has
myst_enable_extensions = ["amsmath", "attrs_block", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_dmath_double_inline = True

mathjax_path = "mathjax/tex-chtml.js"  # fetched by `make docs`
mathjax3_config = {
    "options": {"enableMenu": False},
    "tex": {"macros": {"top": r"\mathsf{T}"}},  # the bar of MathJax's own is so thin that it is lost on many screens
}
numfig = True
math_numfig = True
math_eqref_format = "({number})"
numfig_format = {"figure": "Figure %s"}

bibtex_bibfiles = ["refs.bib"]
bibtex_reference_style = "author_year"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "all"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

html_theme = "sphinx_book_theme"
html_title = "llamba_ref"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system
html_domain_indices = False  # api.md lists the modules, and nobody looks for a theorem by its label
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "repository_url": repository,
    "use_repository_button": True,
    "use_source_button": False,
    "use_download_button": False,  # each chapter has its own link, to the notebook as it is
    "use_fullscreen_button": False,
    "home_page_in_toc": False,
    "show_toc_level": 2,
    "navbar_persistent": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_exclude = ".linenos, .gp, .go"
