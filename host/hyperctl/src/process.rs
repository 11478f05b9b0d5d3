//! The options of `run` and `exec` for a process, named as docker's, and their translation to the protocol.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::Args;
use hyperinit_protocol::fault::{Fault, OrFault};
use hyperinit_protocol::ids::ProcessId;
use hyperinit_protocol::spec::{Env, Process, RLIMITS, Rlimit};

/// The program's default PATH, which is docker's. The guest's own default is the protocol's; it lacks `sbin`
/// and includes the working directory.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The value of a limit that is unlimited, as in OCI.
const UNLIMITED: u64 = u64::MAX;

/// The options that `run` and `exec` have in common.
#[derive(Debug, Clone, Default, PartialEq, Args)]
pub struct ProcessOptions {
    /// Give the program a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Pass standard input on; without it, the program's is empty
    #[arg(short, long)]
    pub interactive: bool,
    /// Set an environment variable; a name alone takes its value from here, or is left out if it has none
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable)]
    pub env: Vec<Variable>,
    /// Set the environment variables of a file, one per line; --env takes precedence
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// The working directory, an absolute path; `run` makes it if missing
    #[arg(short, long, value_name = "DIR", default_value = "", value_parser = workdir)]
    pub workdir: String,
    /// The user and group, by names or numbers of the container
    #[arg(short, long, value_name = "USER[:GROUP]", default_value = "")]
    pub user: String,
}

/// An environment variable to set.
#[derive(Clone, PartialEq, Eq)]
pub struct Variable {
    name: String,
    /// `None`: the value that it has in hyperctl's environment.
    value: Option<String>,
}

impl std::fmt::Debug for Variable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}=…", self.name)
    }
}

impl ProcessOptions {
    /// The process in the protocol, without the fields that only an init has.
    pub fn process(
        &self,
        id: ProcessId,
        (stdio, stderr): (u64, u64),
        args: &[String],
    ) -> Result<Process, Fault> {
        let (user, group) = self.user.split_once(':').unwrap_or((&self.user, ""));
        Ok(Process {
            id,
            user: user.to_owned(),
            group: group.to_owned(),
            additional_groups: Vec::new(),
            terminal: self.tty,
            stdio,
            stderr: if self.tty { 0 } else { stderr },
            args: args.to_vec(),
            envs: self.environment(|name| std::env::var_os(name))?,
            workdir: self.workdir.clone(),
            rlimits: Vec::new(),
        })
    }

    /// The variables in order: if a name has several values, the guest takes the last.
    fn environment(&self, here: impl Fn(&str) -> Option<OsString>) -> Result<Vec<Env>, Fault> {
        let mut all = vec![Variable { name: "PATH".to_owned(), value: Some(PATH.to_owned()) }];
        for file in &self.env_file {
            all.extend(variables_of(file)?);
        }
        all.extend(self.env.iter().cloned());
        let mut envs = Vec::new();
        for Variable { name, value } in all {
            let value = match value {
                Some(value) => value,
                None => match here(&name).map(OsString::into_string) {
                    Some(Ok(value)) => value,
                    Some(Err(_)) => {
                        return Err(Fault::new(
                            "passing on",
                            name,
                            "its value is not UTF-8, as it has to be",
                        ));
                    }
                    None => continue,
                },
            };
            envs.push(Env { env: name, value });
        }
        Ok(envs)
    }
}

/// Parses `NAME=VALUE` or `NAME`.
fn variable(word: &str) -> Result<Variable, String> {
    let (name, value) = word.split_once('=').map_or((word, None), |(name, value)| (name, Some(value)));
    if name.is_empty() {
        Err("there is no name".to_owned())
    } else {
        Ok(Variable { name: name.to_owned(), value: value.map(str::to_owned) })
    }
}

fn variables_of(file: &Path) -> Result<Vec<Variable>, Fault> {
    let doing = "reading the environment in";
    let bytes = std::fs::read(file).fault(doing, file.display())?;
    let text = str::from_utf8(&bytes).map_err(|_| Fault::new(doing, file.display(), "it is not UTF-8"))?;
    variables(text).map_err(|why| Fault::new(doing, file.display(), why))
}

/// The variables in the text of such a file, read as docker reads it: a value is everything after the `=`,
/// including blanks and quotes.
fn variables(text: &str) -> Result<Vec<Variable>, String> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let lines = text.lines().map(str::trim_start).enumerate();
    lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(number, line)| {
            match variable(line) {
                Ok(variable) if !variable.name.contains([' ', '\t']) => Ok(variable),
                Ok(_) => Err("a blank in the name".to_owned()),
                Err(why) => Err(why),
            }
            // The message must not show the value, which may be secret.
            .map_err(|why| format!("line {}: {why}", number + 1))
        })
        .collect()
}

fn workdir(word: &str) -> Result<String, String> {
    if word.is_empty() || word.starts_with('/') {
        Ok(word.to_owned())
    } else {
        Err(format!("the working directory '{word}' is invalid, it needs to be an absolute path"))
    }
}

/// Parses `NAME=SOFT[:HARD]`; -1 is unlimited.
pub fn ulimit(word: &str) -> Result<Rlimit, String> {
    let form = || "not of the form NAME=SOFT[:HARD]".to_owned();
    let (name, values) = word.split_once('=').ok_or_else(form)?;
    let kind = format!("RLIMIT_{}", name.to_ascii_uppercase());
    if name != name.to_ascii_lowercase() || !RLIMITS.contains(&kind.as_str()) {
        return Err(format!("no such limit: {name:?}"));
    }
    let value = |text: &str| match text {
        "-1" => Ok(UNLIMITED),
        _ => text.parse::<u64>().map_err(|_| form()),
    };
    let (soft, hard) = values.split_once(':').unwrap_or((values, values));
    let (soft, hard) = (value(soft)?, value(hard)?);
    if soft <= hard {
        Ok(Rlimit { kind, hard, soft })
    } else {
        Err("the soft limit is above the hard one".to_owned())
    }
}

/// Parses `NAME=VALUE`.
pub fn sysctl(word: &str) -> Result<(String, String), String> {
    match word.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("not of the form NAME=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(env: &[&str], env_file: Vec<PathBuf>) -> Result<Vec<String>, Fault> {
        let env = env.iter().map(|word| variable(word).unwrap()).collect();
        let options = ProcessOptions { env, env_file, ..ProcessOptions::default() };
        let here = |name: &str| (name == "HERE").then(|| OsString::from("of here"));
        let envs = options.environment(here)?;
        Ok(envs.into_iter().map(|env| format!("{}={}", env.env, env.value)).collect())
    }

    #[test]
    fn the_last_word_on_a_variable_is_the_callers() {
        let path = format!("PATH={PATH}");
        assert_eq!(environment(&[], vec![]).unwrap(), [path.as_str()]);
        assert_eq!(
            environment(&["A=1", "B=x=y", "C=", "HERE", "NOWHERE", "PATH=/p"], vec![]).unwrap(),
            [path.as_str(), "A=1", "B=x=y", "C=", "HERE=of here", "PATH=/p"]
        );
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("env");
        std::fs::write(&file, "A=of the file\nHERE\n").unwrap();
        assert_eq!(
            environment(&["A=1"], vec![file.clone()]).unwrap(),
            [path.as_str(), "A=of the file", "HERE=of here", "A=1"]
        );
        std::fs::write(&file, b"A=\xff").unwrap();
        assert!(environment(&[], vec![file]).unwrap_err().to_string().ends_with("it is not UTF-8"));
        assert!(variable("=x").is_err() && variable("").is_err());
    }

    #[test]
    fn a_file_of_variables_is_read_as_docker_reads_it() {
        let text = "\u{feff}A=1\r\n  B= two words \n# C=3\n\n\t#\nD='quoted' # not a comment\nHERE\nE=a=b";
        let read: Vec<_> = variables(text).unwrap().into_iter().map(|v| (v.name, v.value)).collect();
        let expected = [
            ("A", Some("1")),
            ("B", Some(" two words ")),
            ("D", Some("'quoted' # not a comment")),
            ("HERE", None),
            ("E", Some("a=b")),
        ];
        assert_eq!(read, expected.map(|(name, value)| (name.to_owned(), value.map(str::to_owned))));
        assert_eq!(variables("A=1\nA B=1").unwrap_err(), "line 2: a blank in the name");
        assert_eq!(variables("=secret").unwrap_err(), "line 1: there is no name");
    }

    #[test]
    fn a_working_directory_is_absolute() {
        assert_eq!((workdir("").unwrap(), workdir("/a b").unwrap()), (String::new(), "/a b".to_owned()));
        assert_eq!(
            workdir("a/b").unwrap_err(),
            "the working directory 'a/b' is invalid, it needs to be an absolute path"
        );
    }

    #[test]
    fn limits_have_dockers_names() {
        let limit = |kind: &str, soft, hard| Ok(Rlimit { kind: kind.to_owned(), soft, hard });
        assert_eq!(ulimit("nofile=1024"), limit("RLIMIT_NOFILE", 1024, 1024));
        assert_eq!(ulimit("core=0:-1"), limit("RLIMIT_CORE", 0, UNLIMITED));
        assert_eq!(ulimit("memlock=-1"), limit("RLIMIT_MEMLOCK", UNLIMITED, UNLIMITED));
        for bad in ["nofile", "nofile=", "nofile=a", "nofile=1:", "nofile=-2", "NOFILE=1", "files=1", "=1"] {
            assert!(ulimit(bad).is_err(), "{bad}");
        }
        assert_eq!(ulimit("nofile=2:1").unwrap_err(), "the soft limit is above the hard one");
        assert!(ulimit("nofile=-1:1").is_err());
        assert_eq!(sysctl("net.a=1 2"), Ok(("net.a".to_owned(), "1 2".to_owned())));
        assert!(sysctl("net.a").is_err() && sysctl("=1").is_err());
    }
}
