//! The options of the guest kernel, as policy/kernel asks for them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use hyperinit_protocol::fault::Fault;
use serde::Deserialize;

use super::config::Config;

/// The files for the one architecture of hyperctl's VMs.
const FILES: [(&str, &str); 2] = [
    ("policy/kernel/common.json", include_str!("../../../../policy/kernel/common.json")),
    ("policy/kernel/x86_64.json", include_str!("../../../../policy/kernel/x86_64.json")),
];

/// One file of policy/kernel.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    about: String,
    groups: BTreeMap<String, Vec<Asked>>,
}

/// An option that must be set, or must be off.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    /// The option's name, without CONFIG_.
    option: String,
    is: Value,
    why: String,
    /// The feature of the guest that a kernel without this option lacks.
    feature: Option<String>,
}

/// What an option has to be.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Value {
    /// Built in, or off.
    Switch(bool),
    Number(i64),
    Text(String),
}

impl Value {
    /// The value as in a configuration; `None` if the option is off.
    fn text(&self) -> Option<String> {
        match self {
            Value::Switch(true) => Some("y".to_owned()),
            Value::Switch(false) => None,
            Value::Number(number) => Some(number.to_string()),
            Value::Text(text) => Some(format!("{text:?}")),
        }
    }
}

/// All options of policy/kernel.
pub struct Options(Vec<File>);

impl Options {
    /// Parses the embedded files. A fault is a mistake in policy/kernel.
    pub fn read() -> Result<Options, Fault> {
        let read = |(name, text): (&str, &str)| {
            serde_json::from_str(text).map_err(|error| Fault::new("reading", name, error.to_string()))
        };
        FILES.into_iter().map(read).collect::<Result<_, _>>().map(Options)
    }

    fn all(&self) -> impl Iterator<Item = &Asked> {
        self.0.iter().flat_map(|file| file.groups.values().flatten())
    }

    /// The start of a configuration, for `make KCONFIG_ALLCONFIG=FILE allnoconfig`, with the reasons as
    /// comments.
    pub fn fragment(&self) -> String {
        let mut text = String::new();
        for file in &self.0 {
            let _ = writeln!(text, "# {}", file.about);
            for (group, options) in &file.groups {
                let _ = writeln!(text, "\n# --- {group}");
                for Asked { option, is, why, .. } in options {
                    let _ = writeln!(text, "# {why}");
                    let _ = match is.text() {
                        Some(value) => writeln!(text, "CONFIG_{option}={value}"),
                        None => writeln!(text, "# CONFIG_{option} is not set"),
                    };
                }
            }
        }
        text
    }

    /// Every option that differs from policy/kernel in a configuration, one line each.
    pub fn violations(&self, config: &Config) -> Vec<String> {
        let wrong = self.all().filter_map(|Asked { option, is, why, .. }| {
            let (asked, had) = (is.text(), config.get(option));
            let name =
                |value: Option<&str>| value.map_or_else(|| "off".to_owned(), |value| format!("={value}"));
            (asked.as_deref() != had).then(|| {
                format!("CONFIG_{option} has to be {}, is {}: {why}", name(asked.as_deref()), name(had))
            })
        });
        wrong.collect()
    }

    /// The features that a guest lacks with a kernel of this configuration, each with the missing options.
    pub fn lacking(&self, config: &Config) -> BTreeMap<&str, BTreeSet<&str>> {
        let mut all: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for Asked { option, feature, .. } in self.all() {
            if let Some(feature) = feature
                && config.get(option).is_none()
            {
                all.entry(feature).or_default().insert(option);
            }
        }
        all
    }

    /// The options that features need and that are modules in this configuration; the initramfs has to
    /// contain them.
    pub fn modules(&self, config: &Config) -> Vec<&str> {
        let needed = self.all().filter(|asked| asked.feature.is_some());
        needed.map(|asked| asked.option.as_str()).filter(|option| config.get(option) == Some("m")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_is_what_it_asks_for() {
        let options = Options::read().unwrap();
        let fragment = options.fragment();
        assert_eq!(options.violations(&Config::parse(&fragment)), Vec::<String>::new());
        assert!(options.lacking(&Config::parse(&fragment)).is_empty());
        for line in [
            "CONFIG_STATIC_USERMODEHELPER_PATH=\"\"",
            "# CONFIG_MODULES is not set",
            "CONFIG_PANIC_TIMEOUT=-1",
        ] {
            assert!(fragment.lines().any(|other| other == line), "{line}");
        }
    }

    #[test]
    fn what_is_missing_forbidden_or_another_value_is_named() {
        let options = Options::read().unwrap();
        let changed = options
            .fragment()
            .replace("# CONFIG_IO_URING is not set", "CONFIG_IO_URING=y")
            .replace("CONFIG_9P_FS=y\n", "CONFIG_9P_FS=m\n")
            .replace("CONFIG_VIRTIO_FS=y\n", "")
            .replace("CONFIG_HARDENED_USERCOPY=y\n", "# CONFIG_HARDENED_USERCOPY is not set\n");
        let config = Config::parse(&changed);
        let violations = options.violations(&config);
        for start in [
            "CONFIG_IO_URING has to be off, is =y: ",
            "CONFIG_9P_FS has to be =y, is =m: ",
            "CONFIG_VIRTIO_FS has to be =y, is off: ",
            "CONFIG_HARDENED_USERCOPY has to be =y, is off: ",
        ] {
            assert!(violations.iter().any(|line| line.starts_with(start)), "{start}: {violations:?}");
        }
        assert_eq!(violations.len(), 4, "{violations:?}");
        assert_eq!(options.lacking(&config).keys().collect::<Vec<_>>(), [&"a share by virtiofs"]);
        assert_eq!(options.modules(&config), ["9P_FS"]);
    }
}
