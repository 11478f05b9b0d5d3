//! The files of policy/ as they are written, and where in them a rule is: policy/README.md describes them.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::compiled::Device;

/// One file below policy/.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path below policy/ without the extension: `netd`, `container/default`, `lists/ceiling`.
    pub name: String,
    /// As an error names it.
    pub file: String,
    /// What it says.
    pub text: String,
}

/// policy/*.json and policy/container/*.json.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// What the process is and why it may do what it may.
    pub about: String,
    /// The policy whose filter and bounding set it inherits.
    #[serde(default)]
    pub below: Option<String>,
    /// Root, if absent.
    #[serde(default)]
    pub user: User,
    /// Whether execve gains nothing.
    pub no_new_privs: bool,
    /// Whether it leaves every mount of the guest for an empty directory: it opens nothing by a path any
    /// more.
    #[serde(default)]
    pub empty_root: bool,
    /// What it may do.
    pub capabilities: Vec<CapabilityRule>,
    /// Which system calls it may make.
    pub seccomp: Seccomp,
    /// A container's files: a profile has them, a process does not.
    #[serde(default)]
    pub container: Option<Container>,
}

/// Whom a process runs as.
#[derive(Debug, Deserialize, Default, Clone, Copy)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Not 0: a process that is not root keeps its capabilities over setresuid.
    pub uid: u32,
    /// See `uid`.
    pub gid: u32,
    /// Whether it opens and makes files as root all the same (setfsuid(2)). The kernel's settings in
    /// /proc/sys stay closed to it: the kernel looks at the effective user there.
    #[serde(default)]
    pub root_files: bool,
}

/// One capability by its name, or all `of` another policy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapabilityRule {
    /// capabilities(7).
    #[serde(default)]
    pub name: Option<String>,
    /// A policy's name.
    #[serde(default)]
    pub of: Option<String>,
    /// What for.
    pub why: String,
    /// As a rule's.
    #[serde(default)]
    pub unseen: Option<String>,
    /// As a rule's.
    #[serde(default)]
    pub varies: Option<String>,
}

impl CapabilityRule {
    /// What it is about.
    pub fn key(&self) -> &str {
        self.name.as_deref().or(self.of.as_deref()).unwrap_or_default()
    }
}

/// A filter.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seccomp {
    /// What happens to a call without a rule.
    pub default: Default_,
    /// Lists whose rules this policy has too: policy/lists/NAME.json.
    #[serde(default)]
    pub include: Vec<String>,
    /// Its own rules that hold always, by what they are for.
    #[serde(default)]
    pub groups: Vec<Group>,
    /// Its other rules.
    pub rules: Vec<Rule>,
}

/// What happens to a call without a rule.
#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Default_ {
    /// SIGSYS: the process names the call and dies. The rules allow.
    Trap,
    /// It fails: with EPERM, and with ENOSYS where the build knows no call of its number. The rules allow.
    Deny,
    /// It passes. The rules deny.
    Allow,
}

/// One system call.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its name.
    pub syscall: String,
    /// Why the policy has the entry.
    pub why: String,
    /// Any of these lists, all of its conditions; absent: always.
    #[serde(default)]
    pub when: Vec<Vec<String>>,
    /// None of these lists, instead of `when`.
    #[serde(default)]
    pub unless: Vec<Vec<String>>,
    /// Deny with this error. The default of a denial is EPERM; in an allow-list it makes a rule a denial.
    #[serde(default)]
    pub errno: Option<String>,
    /// Not every architecture has the call.
    #[serde(default)]
    pub optional: bool,
    /// Why it stays although no test on a machine sees it used, or not all of it: tests/minimal reads it.
    #[serde(default)]
    pub unseen: Option<String>,
    /// Why it depends on the machine or on chance whether a test sees it used, instead of `unseen`.
    #[serde(default)]
    pub varies: Option<String>,
}

/// Calls with one reason.
#[derive(Debug, Deserialize)]
#[serde(from = "GroupFile")]
pub struct Group {
    /// A rule for each.
    pub rules: Vec<Rule>,
}

/// A group as it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    /// Why the policy has the entry.
    why: String,
    /// As a rule's, for each.
    #[serde(default)]
    optional: bool,
    /// The names.
    syscalls: Vec<String>,
}

impl From<GroupFile> for Group {
    fn from(GroupFile { why, optional, syscalls }: GroupFile) -> Group {
        let rule = |syscall| Rule {
            syscall,
            why: why.clone(),
            when: Vec::new(),
            unless: Vec::new(),
            errno: None,
            optional,
            unseen: None,
            varies: None,
        };
        Group { rules: syscalls.into_iter().map(rule).collect() }
    }
}

/// What a container's files are like.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// Paths hidden from it.
    pub masked_paths: Vec<String>,
    /// Paths that it can only read.
    pub readonly_paths: Vec<String>,
    /// The nodes of its /dev.
    pub devices: Vec<Device>,
    /// Whether /sys is read-only.
    pub readonly_sys: bool,
    /// Whether the root filesystem is read-only, whatever the host says.
    #[serde(default)]
    pub readonly_root: bool,
    /// Whether what is started is in a Landlock scope of its own.
    #[serde(default)]
    pub scoped: bool,
}

/// policy/lists/*.json: rules that several policies have.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    /// What they have in common.
    pub about: String,
    /// As that of the policies that include it.
    pub default: Default_,
    /// As a policy's.
    #[serde(default)]
    pub groups: Vec<Group>,
    /// The other rules.
    pub rules: Vec<Rule>,
}

/// Parses a file.
pub fn parse<T: DeserializeOwned>(source: &Source) -> Result<T, String> {
    serde_json::from_str(&source.text).map_err(|error| format!("{}:{}: {error}", source.file, error.line()))
}

/// A place in a file, as an error begins: `policy/netd.json:12`.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    file: &'a str,
    line: usize,
}

impl<'a> Place<'a> {
    /// The line of a key.
    pub fn of_key(source: &'a Source, key: &str) -> Place<'a> {
        let at = source.text.find(&format!("{key:?}")).unwrap_or(0);
        Place { file: &source.file, line: line(&source.text, at) }
    }

    /// The error here.
    pub fn error(&self, what: &str, why: &str) -> String {
        format!("{self}: {what}: {why}")
    }
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// Where the items of the list under `section` are, each told by its key, in the order of the file.
pub fn places<'a>(source: &'a Source, section: &str, keys: impl Iterator<Item = &'a str>) -> Vec<Place<'a>> {
    let mut at = source.text.find(&format!("{section:?}")).unwrap_or(0);
    keys.map(|key| {
        let quoted = format!("{key:?}");
        if let Some(further) = source.text.get(at..).and_then(|rest| rest.find(&quoted)) {
            at += further + quoted.len();
        }
        Place { file: &source.file, line: line(&source.text, at) }
    })
    .collect()
}

fn line(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&byte| byte == b'\n').count() + 1
}
