"""Web page: a Gradio app that generates with adapters and trains them."""
