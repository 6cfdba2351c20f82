"""Official SAM building blocks made prompt-free, multi-class and adaptable."""
