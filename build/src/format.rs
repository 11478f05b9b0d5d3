//! The format of the files in policy/ (described in policy/README.md), and the places of rules in them.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::compiled::Device;

/// One file below policy/.
#[derive(Debug, Clone)]
pub struct Source {
    /// Its path below policy/ without the extension: `netd`, `container/default`, `lists/ceiling`.
    pub name: String,
    /// The file's path in error messages.
    pub file: String,
    /// The file's text.
    pub text: String,
}

/// A file policy/*.json or policy/container/*.json.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyFile {
    /// What the process is and why it may do what it may.
    pub about: String,
    /// The policy whose filter and bounding set it inherits.
    #[serde(default)]
    pub below: Option<String>,
    /// The user that the process runs as; root if absent.
    #[serde(default)]
    pub user: User,
    /// Whether no_new_privs is set, so that execve grants nothing.
    pub no_new_privs: bool,
    /// Whether the process leaves every mount of the guest for an empty root directory, so that it can open
    /// nothing by a path any more.
    #[serde(default)]
    pub empty_root: bool,
    /// The capabilities that it has.
    pub capabilities: Vec<CapabilityRule>,
    /// The system calls that it may make.
    pub seccomp: Seccomp,
    /// The files of a container. Only a container profile has this.
    #[serde(default)]
    pub container: Option<Container>,
}

/// The user that a process runs as.
#[derive(Debug, Deserialize, Default, Clone, Copy)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// The user's number, not 0. A process that is not root keeps its capabilities over setresuid.
    pub uid: u32,
    /// The group's number, not 0.
    pub gid: u32,
    /// Whether it still opens and creates files as root (setfsuid(2)). The kernel's settings in /proc/sys
    /// stay closed to it, because the kernel checks the effective user there.
    #[serde(default)]
    pub root_files: bool,
}

/// A capability by its name, or all capabilities `of` another policy.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapabilityRule {
    /// The capability's name, as in capabilities(7).
    #[serde(default)]
    pub name: Option<String>,
    /// The name of the policy whose capabilities it has.
    #[serde(default)]
    pub of: Option<String>,
    /// Why the policy has it.
    pub why: String,
    /// As in [`Rule`].
    #[serde(default)]
    pub unseen: Option<String>,
    /// As in [`Rule`].
    #[serde(default)]
    pub varies: Option<String>,
}

impl CapabilityRule {
    /// The `name` or the `of`, whichever is there.
    pub fn key(&self) -> &str {
        self.name.as_deref().or(self.of.as_deref()).unwrap_or_default()
    }
}

/// A seccomp filter.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Seccomp {
    /// The answer to a call without a rule.
    pub default: Default_,
    /// Names of lists whose rules this policy has too: policy/lists/NAME.json.
    #[serde(default)]
    pub include: Vec<String>,
    /// Rules of its own without conditions, grouped by their reason.
    #[serde(default)]
    pub groups: Vec<Group>,
    /// The other rules of its own.
    pub rules: Vec<Rule>,
}

/// The answer to a call without a rule.
#[derive(Debug, Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Default_ {
    /// SIGSYS: the process logs the call and dies. The rules allow calls.
    Trap,
    /// The call fails with EPERM, or with ENOSYS if the build knows no call with that number. The rules allow
    /// calls.
    Deny,
    /// The call passes. The rules deny calls.
    Allow,
}

/// A rule about one system call.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The call's name.
    pub syscall: String,
    /// Why the policy has the rule.
    pub why: String,
    /// Lists of conditions. The rule holds if all conditions of any one list hold; without lists it always
    /// holds.
    #[serde(default)]
    pub when: Vec<Vec<String>>,
    /// Instead of `when`: the rule holds if none of these lists holds.
    #[serde(default)]
    pub unless: Vec<Vec<String>>,
    /// Deny the call with this error. In a filter that denies by default, only this makes a rule a denial; in
    /// one that allows by default, EPERM is the default.
    #[serde(default)]
    pub errno: Option<String>,
    /// Whether some architectures do not have the call.
    #[serde(default)]
    pub optional: bool,
    /// Why the rule stays although no test on a machine sees it used, or sees only a part of it used;
    /// tests/minimal reads this.
    #[serde(default)]
    pub unseen: Option<String>,
    /// Instead of `unseen`: why it depends on the machine or on chance whether a test sees the rule used.
    #[serde(default)]
    pub varies: Option<String>,
}

/// Calls that are allowed or denied for one reason.
#[derive(Debug, Deserialize)]
#[serde(from = "GroupFile")]
pub struct Group {
    /// One rule for each call.
    pub rules: Vec<Rule>,
}

/// A group as written in the file.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupFile {
    /// Why the policy has these rules.
    why: String,
    /// As in [`Rule`], for each call.
    #[serde(default)]
    optional: bool,
    /// The names of the calls.
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

/// The files of a container.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Container {
    /// Paths that are hidden from the container.
    pub masked_paths: Vec<String>,
    /// Paths that the container can only read.
    pub readonly_paths: Vec<String>,
    /// The nodes of its /dev.
    pub devices: Vec<Device>,
    /// Whether /sys is read-only.
    pub readonly_sys: bool,
    /// Whether the root filesystem is read-only, whatever the host says.
    #[serde(default)]
    pub readonly_root: bool,
    /// Whether the container's processes are in a Landlock scope of their own.
    #[serde(default)]
    pub scoped: bool,
}

/// A file policy/lists/*.json: rules that several policies share.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct List {
    /// What the rules have in common.
    pub about: String,
    /// The default of the policies that include the list.
    pub default: Default_,
    /// As in [`Seccomp`].
    #[serde(default)]
    pub groups: Vec<Group>,
    /// The other rules.
    pub rules: Vec<Rule>,
}

/// Parses a file.
pub fn parse<T: DeserializeOwned>(source: &Source) -> Result<T, String> {
    serde_json::from_str(&source.text).map_err(|error| format!("{}:{}: {error}", source.file, error.line()))
}

/// A place in a file, in the form in which an error message begins: `policy/netd.json:12`.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    file: &'a str,
    line: usize,
}

impl<'a> Place<'a> {
    /// The line where a key first occurs.
    pub fn of_key(source: &'a Source, key: &str) -> Place<'a> {
        let at = source.text.find(&format!("{key:?}")).unwrap_or(0);
        Place { file: &source.file, line: line(&source.text, at) }
    }

    /// An error message about this place.
    pub fn error(&self, what: &str, why: &str) -> String {
        format!("{self}: {what}: {why}")
    }
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// The places of the items of the list under `section`. Each item is found by its key; the keys are in the
/// order of the file.
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
