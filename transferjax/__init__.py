"""transferjax: move what a pretrained network knows into the network you need."""
