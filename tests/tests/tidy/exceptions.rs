//! Where a rule does not hold, and why. `tidy` also fails when an exception excuses nothing.

/// The rule, the file, and why the rule does not hold in it.
pub(crate) type Exception = (&'static str, &'static str, &'static str);

/// All of them.
pub(crate) const EXCEPTIONS: &[Exception] = &[
    (
        "sleep",
        "tests/src/deadline.rs",
        "looks again at state that the kernel announces to nobody, up to a deadline",
    ),
    (
        "global-state",
        "tests/src/requirement.rs",
        "a probe guest is booted once for all tests of a process, which the test runner starts",
    ),
    (
        "global-state",
        "tests/src/ctr.rs",
        "numbers the names of containers, so that no two tests of a process share one",
    ),
];
