"""A logistic regression on texts' features: the linear classifier that a tuned model is measured and helped by."""

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

FOLDS = 5
STRENGTH = 30.0  # inverse regularisation C, for features of length 1
LARGEST_FIT = 5e10  # questions x features x intents; all of banking77 have 1e9


def too_large(features: int, classes: int) -> bool:
    """Whether a fit to so many features, of all questions together, would take hours."""
    return features * classes > LARGEST_FIT


def fit(inputs: "np.ndarray", labels: "np.ndarray") -> Any:
    """A logistic regression on features (n, e) and their classes (n,)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # what a hundred steps leave open changes no answer
        return LogisticRegression(C=STRENGTH).fit(inputs, labels)


def out_of_fold(inputs: "np.ndarray", labels: "np.ndarray", classes: int) -> "np.ndarray":
    """Probabilities (n, classes) of every row by classifiers that did not see it; zeros where there can be none."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    found = np.zeros((len(labels), classes), np.float32)
    folds = min(FOLDS, int(np.bincount(labels, minlength=1).max()))
    if folds < 2 or too_large(inputs.size, classes):  # one question an intent
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # an intent with fewer questions than folds
        parts = list(StratifiedKFold(folds, shuffle=True, random_state=0).split(inputs, labels))
    for seen, unseen in parts:
        if len(np.unique(labels[seen])) > 1:
            model = fit(inputs[seen], labels[seen])
            found[np.ix_(unseen, model.classes_)] = model.predict_proba(inputs[unseen])
    return found
