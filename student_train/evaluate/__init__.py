"""What a student is worth. The way through::

    config     the settings of the commands
    network    a frozen student, teacher or raw pixels, and the images as it takes them
    features   its features of a data set, kept on disk
    labelled   images to train on and to test on, with their features
    knn, linear, lowshot     what classifies them; linear_augmented and finetune go through the network, on crops
    results    outcomes in the run folder; compare sets several runs side by side

``transfer`` packs other tasks, and ``detection`` trains a detector on the student.
"""
