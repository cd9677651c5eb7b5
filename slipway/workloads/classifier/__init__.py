"""Classification of images: any folder of class folders."""
