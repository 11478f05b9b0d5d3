//! The result of trying an effect.

use nix::errno::Errno;

/// The result of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The call succeeded and returned this value.
    Done(u64),
    /// The kernel refused the call with this error.
    Refused(Errno),
    /// The seccomp filter trapped the call, which would have ended the process.
    Trapped,
    /// The other process has no pid in the PID namespace of this one.
    Unseen,
    /// The call was made, and had no effect.
    Nothing,
    /// The process has nothing to try this with, or is itself the victim.
    NotHere,
}

impl Answer {
    /// The word for the answer in the table.
    pub fn word(self) -> String {
        match self {
            Answer::Done(_) => "allowed".to_owned(),
            Answer::Refused(errno) => format!("{errno:?}"),
            Answer::Trapped => "trap".to_owned(),
            Answer::Unseen => "unseen".to_owned(),
            Answer::Nothing => "nothing".to_owned(),
            Answer::NotHere => "–".to_owned(),
        }
    }

    /// Counts `errno` as success: the kernel finds this error only after it has allowed the call. For calls
    /// whose arguments are wrong on purpose.
    pub fn past(self, errno: Errno) -> Answer {
        if self == Answer::Refused(errno) { Answer::Done(0) } else { self }
    }

    /// The value that the call returned, if it succeeded.
    pub fn value(self) -> Option<u64> {
        match self {
            Answer::Done(value) => Some(value),
            _ => None,
        }
    }
}

/// Several answers in one cell: one word if all are equal, otherwise each word with the parts that gave it.
pub fn together(answers: &[(String, Answer)]) -> String {
    let mut words: Vec<(String, Vec<&str>)> = Vec::new();
    for (what, answer) in answers.iter().filter(|(_, answer)| *answer != Answer::NotHere) {
        let word = answer.word();
        match words.iter_mut().find(|(other, _)| *other == word) {
            Some((_, all)) => all.push(what),
            None => words.push((word, vec![what])),
        }
    }
    match &words[..] {
        [] => Answer::NotHere.word(),
        [(word, _)] => word.clone(),
        _ => {
            let parts = words.iter().map(|(word, all)| format!("{word} ({})", all.join(", ")));
            parts.collect::<Vec<_>>().join("; ")
        }
    }
}
