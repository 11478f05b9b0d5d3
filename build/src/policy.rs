//! The policy compiler: policy/**/*.json → capability masks and BPF. It does no input or output; build.rs
//! reads and writes the files.
//!
//! A rule that is out of order, unexplained or misspelt, that can never hold, that adds nothing, or that
//! allows what a filter above denies is an error with the file's name and the line.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::SeccompAction;

use crate::bpf::{self, Answer};
use crate::compiled::{CapSet, CompiledPolicy, CompiledProfile};
use crate::format::{CapabilityRule, Default_, Group, List, Place, PolicyFile, Rule, Source, parse, places};
use crate::names::{CAPABILITIES, constant};

/// The syscall table of the target.
pub trait Syscalls {
    /// The number of a call, if the target has the call.
    fn number(&self, name: &str) -> Option<u32>;
    /// Whether any architecture has a call with this name.
    fn exists(&self, name: &str) -> bool;
    /// The numbers of all calls of the target.
    fn numbers(&self) -> BTreeSet<u32>;
}

/// The compiled form of a file: the policy of a process, or a container profile.
#[derive(Debug, Clone)]
pub enum Compiled {
    /// policy/*.json
    Policy(CompiledPolicy),
    /// policy/container/*.json
    Profile(CompiledProfile),
}

/// Compiles all files for an architecture (as in `CARGO_CFG_TARGET_ARCH`). Returns each policy and profile
/// with its name, or all errors.
pub fn compile(
    sources: &[Source],
    arch: &str,
    syscalls: &dyn Syscalls,
) -> Result<Vec<(String, Compiled)>, Vec<String>> {
    let files = Files::parse(sources)?;
    let mut errors = Vec::new();
    let mut compiled = Vec::new();
    for &name in files.policies.keys() {
        match files.compile(name, arch, syscalls) {
            Ok(policy) => compiled.push((name.to_owned(), policy)),
            Err(error) => errors.push(error),
        }
    }
    if errors.is_empty() { Ok(compiled) } else { Err(errors) }
}

/// The parsed files, each checked on its own.
struct Files<'a> {
    policies: BTreeMap<&'a str, (PolicyFile, &'a Source)>,
    lists: BTreeMap<&'a str, (List, &'a Source)>,
}

/// A rule and its place in the file.
type Placed<'a> = (&'a Rule, Place<'a>);

impl<'a> Files<'a> {
    fn parse(sources: &'a [Source]) -> Result<Files<'a>, Vec<String>> {
        let mut files = Files { policies: BTreeMap::new(), lists: BTreeMap::new() };
        let mut errors = Vec::new();
        for source in sources {
            let added = match source.name.strip_prefix("lists/") {
                Some(name) => files.add_list(name, source),
                None => files.add_policy(source),
            };
            errors.extend(added.err());
        }
        if errors.is_empty() { Ok(files) } else { Err(errors) }
    }

    fn add_list(&mut self, name: &'a str, source: &'a Source) -> Result<(), String> {
        let list: List = parse(source)?;
        check_about(&list.about, source)?;
        check_sorted(&list.groups, &list.rules, source, list.default)?;
        self.lists.insert(name, (list, source));
        Ok(())
    }

    fn add_policy(&mut self, source: &'a Source) -> Result<(), String> {
        let policy: PolicyFile = parse(source)?;
        check_about(&policy.about, source)?;
        check_capabilities(&policy.capabilities, source)?;
        check_sorted(&policy.seccomp.groups, &policy.seccomp.rules, source, policy.seccomp.default)?;
        self.policies.insert(&source.name, (policy, source));
        Ok(())
    }

    fn compile(&self, name: &str, arch: &str, syscalls: &dyn Syscalls) -> Result<Compiled, String> {
        let Some((file, source)) = self.policies.get(name) else {
            return Err(format!("{name}: no such policy"));
        };
        let capabilities = self.capabilities(file, source)?;
        let rules = self.rules(file, source)?;
        self.check_above(file, source, &rules, &capabilities)?;
        let mut answers = answers(&rules, file.seccomp.default, syscalls)?;
        let beyond = match file.seccomp.default {
            Default_::Trap => None,
            Default_::Allow => bpf::x32(arch),
            Default_::Deny => Some(answer_unknown(&mut answers, syscalls)),
        };
        let policy = CompiledPolicy {
            about: file.about.clone(),
            uid: file.user.uid,
            gid: file.user.gid,
            root_files: file.user.root_files,
            no_new_privs: file.no_new_privs,
            empty_root: file.empty_root,
            capabilities: CapSet(capabilities.keys().fold(0, |set, bit| set | 1 << bit)),
            program: bpf::program(&answers, &file.seccomp.default.action(), beyond, arch)
                .map_err(|why| Place::of_key(source, "seccomp").error(name, &why))?,
            rules: readable(&capabilities, &rules, file.seccomp.default),
        };
        Ok(match &file.container {
            None => Compiled::Policy(policy),
            Some(container) => Compiled::Profile(CompiledProfile {
                policy,
                masked_paths: container.masked_paths.clone(),
                readonly_paths: container.readonly_paths.clone(),
                devices: container.devices.clone(),
                readonly_sys: container.readonly_sys,
                readonly_root: container.readonly_root,
                scoped: container.scoped,
            }),
        })
    }

    /// The policy's capabilities by their bit, each with its reasons.
    fn capabilities(&self, file: &PolicyFile, source: &Source) -> Result<BTreeMap<usize, String>, String> {
        let mut all = BTreeMap::<usize, String>::new();
        let places = places(source, "capabilities", file.capabilities.iter().map(CapabilityRule::key));
        for (rule, place) in file.capabilities.iter().zip(places) {
            let Some(of) = &rule.of else {
                let bit = CAPABILITIES.iter().position(|&name| name == rule.key());
                let bit = bit.ok_or_else(|| place.error(rule.key(), "no such capability"))?;
                all.insert(bit, rule.why.clone());
                continue;
            };
            let Some((other, at)) = self.policies.get(of.as_str()) else {
                return Err(place.error(of, "no such policy"));
            };
            if other.capabilities.iter().any(|rule| rule.of.is_some()) {
                return Err(place.error(of, "says itself whose capabilities it has: name those"));
            }
            for (bit, _) in self.capabilities(other, at)? {
                let why = all.entry(bit).or_default();
                let comma = if why.is_empty() { "" } else { "; " };
                why.push_str(&format!("{comma}{of}: {}", rule.why));
            }
        }
        Ok(all)
    }

    /// The rules of the file and of the lists that it includes, by system call. Several rules for one call
    /// add up.
    fn rules<'b>(
        &'b self,
        file: &'b PolicyFile,
        source: &'b Source,
    ) -> Result<BTreeMap<&'b str, Vec<Placed<'b>>>, String> {
        let mut rules = Vec::new();
        let includes = places(source, "include", file.seccomp.include.iter().map(String::as_str));
        for (name, place) in file.seccomp.include.iter().zip(includes) {
            let Some((list, at)) = self.lists.get(name.as_str()) else {
                return Err(place.error(name, "no such list"));
            };
            if list.default != file.seccomp.default {
                return Err(place.error(name, "allows where this file denies, or the other way round"));
            }
            rules.extend(placed(&list.groups, &list.rules, at));
        }
        rules.extend(placed(&file.seccomp.groups, &file.seccomp.rules, source));
        let mut all = BTreeMap::<&str, Vec<Placed<'b>>>::new();
        for rule in rules {
            let earlier = all.entry(&rule.0.syscall).or_default();
            earlier.iter().try_for_each(|earlier| check_pair(earlier, &rule))?;
            earlier.push(rule);
        }
        Ok(all)
    }

    /// Checks the file against the policies that it inherits: a rule that allows what one of them denies
    /// would have no effect.
    fn check_above(
        &self,
        file: &PolicyFile,
        source: &Source,
        rules: &BTreeMap<&str, Vec<Placed<'_>>>,
        capabilities: &BTreeMap<usize, String>,
    ) -> Result<(), String> {
        let mut above = &file.below;
        let place = Place::of_key(source, "below");
        let mut seen = BTreeSet::new();
        while let Some(name) = above {
            let Some((over, at)) = self.policies.get(name.as_str()) else {
                return Err(place.error(name, "no such policy"));
            };
            if !seen.insert(name) || over.seccomp.default != Default_::Allow {
                return Err(place.error(name, "nothing can be below it"));
            }
            if over.no_new_privs && !file.no_new_privs {
                return Err(place.error(name, "has set no_new_privs for all that is below it"));
            }
            let denials = self.rules(over, at)?;
            let denied = |call: &str| {
                let rules = denials.get(call).into_iter().flatten();
                rules.filter(|(rule, _)| always(rule)).map(|(_, place)| *place).next()
            };
            for (rule, place) in
                rules.values().flatten().filter(|(rule, _)| allows(file.seccomp.default, rule))
            {
                if let Some(denial) = denied(&rule.syscall) {
                    return Err(
                        place.error(&rule.syscall, &format!("is denied by {name}, above it: {denial}"))
                    );
                }
            }
            if over.below.is_none() {
                // The policies in between may grant more than they have in use.
                let had = self.capabilities(over, at)?;
                if let Some(bit) = capabilities.keys().find(|bit| !had.contains_key(bit)) {
                    let missing = CAPABILITIES.get(*bit).copied().unwrap_or_default();
                    return Err(place.error(missing, &format!("{name}, above it, does not have it")));
                }
            }
            above = &over.below;
        }
        Ok(())
    }
}

impl Default_ {
    fn action(self) -> SeccompAction {
        match self {
            Default_::Trap => SeccompAction::Trap,
            Default_::Allow => SeccompAction::Allow,
            Default_::Deny => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
        }
    }
}

/// The rules of the groups, then the other rules.
fn placed<'a>(groups: &'a [Group], rules: &'a [Rule], source: &'a Source) -> Vec<Placed<'a>> {
    let grouped = placed_in("groups", groups.iter().flat_map(|group| &group.rules), source);
    grouped.into_iter().chain(placed_in("rules", rules.iter(), source)).collect()
}

/// Rules in the order of the file, each with its place below the key.
fn placed_in<'a>(
    key: &str,
    rules: impl Iterator<Item = &'a Rule> + Clone,
    source: &'a Source,
) -> Vec<Placed<'a>> {
    rules.clone().zip(places(source, key, rules.map(|rule| rule.syscall.as_str()))).collect()
}

fn allows(default: Default_, rule: &Rule) -> bool {
    default != Default_::Allow && rule.errno.is_none()
}

/// Whether the rule holds for any arguments.
fn always(rule: &Rule) -> bool {
    rule.when.is_empty() && rule.unless.is_empty()
}

fn check_about(about: &str, source: &Source) -> Result<(), String> {
    if about.trim().is_empty() {
        return Err(Place::of_key(source, "about").error("about", "says nothing"));
    }
    Ok(())
}

fn check_capabilities(rules: &[CapabilityRule], source: &Source) -> Result<(), String> {
    let mut last = "";
    for (rule, place) in
        rules.iter().zip(places(source, "capabilities", rules.iter().map(CapabilityRule::key)))
    {
        let key = rule.key();
        let error = |why: &str| Err(place.error(key, why));
        if rule.name.is_some() == rule.of.is_some() {
            return error("is not either a `name` or an `of`");
        }
        if key <= last {
            return error("is not in alphabetical order, or there twice");
        }
        if rule.why.trim().is_empty() || blank(rule.unseen.as_ref()) || blank(rule.varies.as_ref()) {
            return error("is not explained");
        }
        if rule.unseen.is_some() && rule.varies.is_some() {
            return error("has `unseen` and `varies`");
        }
        last = key;
    }
    Ok(())
}

/// Whether a reason is given but blank.
fn blank(reason: Option<&String>) -> bool {
    reason.is_some_and(|reason| reason.trim().is_empty())
}

/// Checks each group, and the other rules, separately.
fn check_sorted(groups: &[Group], rules: &[Rule], source: &Source, default: Default_) -> Result<(), String> {
    let placed = placed(groups, rules, source);
    let mut rest = placed.as_slice();
    for length in groups.iter().map(|group| group.rules.len()).chain([rules.len()]) {
        let (these, others) = rest.split_at(length);
        check_rules(these, default)?;
        rest = others;
    }
    Ok(())
}

fn check_rules(rules: &[Placed<'_>], default: Default_) -> Result<(), String> {
    let mut last = "";
    for (rule, place) in rules {
        let error = |why: &str| Err(place.error(&rule.syscall, why));
        if rule.syscall.as_str() <= last {
            return error("is not in alphabetical order, or there twice");
        }
        if rule.why.trim().is_empty() || blank(rule.unseen.as_ref()) || blank(rule.varies.as_ref()) {
            return error("is not explained");
        }
        if rule.unseen.is_some() && rule.varies.is_some() {
            return error("has `unseen` and `varies`");
        }
        if !rule.when.is_empty() && !rule.unless.is_empty() {
            return error("has `when` and `unless`");
        }
        let conditions: Vec<_> = rule.when.iter().chain(&rule.unless).collect();
        if conditions.iter().any(|all| all.is_empty()) {
            return error("has an empty list of conditions, which always holds: the others then say nothing");
        }
        if conditions.iter().collect::<BTreeSet<_>>().len() != conditions.len() {
            return error("has the same conditions twice");
        }
        if default != Default_::Allow && rule.errno.is_some() && !conditions.is_empty() {
            return error("fails only under conditions, in a list of what is allowed: say what is");
        }
        last = &rule.syscall;
    }
    Ok(())
}

/// Checks two rules for the same call, from the file and its lists: the later one has to add something.
fn check_pair((earlier, at): &Placed<'_>, (rule, place): &Placed<'_>) -> Result<(), String> {
    let error = |why: &str| Err(place.error(&rule.syscall, &format!("{why} {at}")));
    if earlier.errno != rule.errno {
        return error("has another answer in");
    }
    if always(earlier) {
        return error("narrows nothing: it always holds by");
    }
    if !earlier.unless.is_empty() || !rule.unless.is_empty() {
        return error("has an `unless`, here or there, and does not add up with");
    }
    if rule.when.iter().any(|all| earlier.when.contains(all)) {
        return error("has conditions that are already in");
    }
    Ok(())
}

/// The answer to each call of the target.
fn answers(
    rules: &BTreeMap<&str, Vec<Placed<'_>>>,
    default: Default_,
    syscalls: &dyn Syscalls,
) -> Result<BTreeMap<u32, Answer>, String> {
    let mut answers = BTreeMap::<u32, Answer>::new();
    for (rule, place) in rules.values().flatten() {
        let error = |why: &str| place.error(&rule.syscall, why);
        let conditions = rule.when.iter().chain(&rule.unless).map(|conditions| bpf::all(conditions));
        let when = conditions.collect::<Result<Vec<_>, _>>().map_err(|why| error(&why))?;
        let mut then = match (&rule.errno, default) {
            (Some(name), _) => errno(name).ok_or_else(|| error(&format!("no such errno: {name}")))?,
            (None, Default_::Allow) => SeccompAction::Errno(libc::EPERM.unsigned_abs()),
            (None, Default_::Trap | Default_::Deny) => SeccompAction::Allow,
        };
        let mut otherwise = default.action();
        if !rule.unless.is_empty() {
            std::mem::swap(&mut then, &mut otherwise);
        }
        let Some(number) = syscalls.number(&rule.syscall) else {
            match (syscalls.exists(&rule.syscall), rule.optional) {
                (false, _) => return Err(error("no such system call")),
                (true, false) => {
                    return Err(error("not on this architecture; `optional` says that this is known"));
                }
                (true, true) => continue,
            }
        };
        match answers.get_mut(&number) {
            // One rule without conditions makes the answer unconditional.
            Some(answer) if answer.when.is_empty() || when.is_empty() => answer.when.clear(),
            Some(answer) => answer.when.extend(when),
            None => drop(answers.insert(number, Answer { when, then, otherwise })),
        }
    }
    Ok(answers)
}

/// Makes each number without a known system call fail with ENOSYS, as an older kernel would, so that programs
/// fall back. Returns the first number above all known ones; the numbers from there on have to fail in the
/// same way.
fn answer_unknown(answers: &mut BTreeMap<u32, Answer>, syscalls: &dyn Syscalls) -> u32 {
    let known = syscalls.numbers();
    let beyond = known.last().map_or(0, |last| last.saturating_add(1));
    for number in (0..beyond).filter(|number| !known.contains(number)) {
        let then = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        answers.insert(number, Answer { when: Vec::new(), otherwise: then.clone(), then });
    }
    beyond
}

/// The errno with this name. Linux has errors from 1 to 133; no other value is accepted, because a denial
/// with 0 would look like success.
fn errno(name: &str) -> Option<SeccompAction> {
    let errno = constant(name).filter(|_| name.starts_with('E'))?;
    u32::try_from(errno).ok().filter(|errno| (1..=133).contains(errno)).map(SeccompAction::Errno)
}

/// The rules as `--policy` prints them.
fn readable(
    capabilities: &BTreeMap<usize, String>,
    rules: &BTreeMap<&str, Vec<Placed<'_>>>,
    default: Default_,
) -> Vec<(String, String)> {
    let capabilities = capabilities
        .iter()
        .map(|(bit, why)| (CAPABILITIES.get(*bit).copied().unwrap_or_default().to_owned(), why.clone()));
    let rules = rules.values().flatten().map(|(rule, _)| {
        let verb = match (default, &rule.errno) {
            (Default_::Trap | Default_::Deny, None) => String::new(),
            (Default_::Allow, None) => "deny ".to_owned(),
            (_, Some(errno)) => format!("deny ({errno}) "),
        };
        let any = |word: &str, lists: &[Vec<String>]| {
            let lists: Vec<String> = lists.iter().map(|all| all.join(" and ")).collect();
            if lists.is_empty() { String::new() } else { format!(" {word} {}", lists.join(", or ")) }
        };
        let conditions = any("when", &rule.when) + &any("unless", &rule.unless);
        (format!("{verb}{}{conditions}", rule.syscall), rule.why.clone())
    });
    capabilities.chain(rules).collect()
}
