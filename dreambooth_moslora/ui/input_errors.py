"""Values of the wrong type, which only a program can send: gradio itself would answer with an empty error."""

import html

import gradio as gr

__all__ = ["explain_bad_values"]

NUMBERS = (gr.Slider, gr.Number)


def explain_bad_values(widget: gr.components.Component) -> None:
    """Make the widget name itself and its expected type when it cannot take a value."""
    own = widget.preprocess

    def preprocess(value: object) -> object:
        try:
            return own(value)
        except gr.Error as error:
            words = f"{widget.label}: {error.message}"
        except (TypeError, ValueError, OverflowError, AttributeError):
            kind = "a number" if isinstance(widget, NUMBERS) else "text"
            words = f"{widget.label} must be {kind}, not {value!r:.30}"
        raise gr.Error(html.escape(words, quote=False), duration=12, print_exception=False)

    widget.preprocess = preprocess
