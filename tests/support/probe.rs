//! A program that makes one system call and exits with its errno (0 for success), for filter rules that no
//! program of an image reaches: an ELF file of a hundred bytes.

/// The load address of the program. Its first bytes are readable memory, for calls that take a pointer.
pub const BASE: u64 = 0x40_0000;

/// As an argument: stands for the result of the previous call.
#[cfg(target_arch = "x86_64")]
pub const RESULT: u64 = 0xffff_ffff_feed_0001;

/// The ELF and program headers, in bytes.
const HEADERS: u64 = 64 + 56;
/// The length of the code of one call, without the handling of its result, in bytes.
#[cfg(target_arch = "x86_64")]
const CALL: u64 = 7 * 10 + 2;
/// The length of the code that exits with the last result, in bytes.
#[cfg(target_arch = "x86_64")]
const EXIT: u64 = 17;

/// A program that makes one call.
#[cfg(target_arch = "x86_64")]
pub fn elf(number: u64, arguments: [u64; 6]) -> Vec<u8> {
    elf_of(&[(number, arguments)], &[])
}

/// The address of the data in a program of `elf_of` with so many calls.
#[cfg(target_arch = "x86_64")]
pub fn data_at(calls: u64) -> u64 {
    BASE + HEADERS + CALL * calls + EXIT
}

/// A program that makes several calls and exits with the errno of the last one. `data` is readable memory
/// behind the code.
#[cfg(target_arch = "x86_64")]
pub fn elf_of(calls: &[(u64, [u64; 6])], data: &[u8]) -> Vec<u8> {
    let mut code = code(calls);
    // xor edi, edi; test rax, rax; cmovs edi, eax; neg edi; mov eax, SYS_exit; syscall
    code.extend([0x31, 0xff, 0x48, 0x85, 0xc0, 0x0f, 0x48, 0xf8, 0xf7, 0xdf]);
    code.extend([0xb8, 0x3c, 0, 0, 0, 0x0f, 0x05]);
    code.extend(data);
    file(code)
}

/// A program that makes the calls in an endless loop and ignores their results.
#[cfg(target_arch = "x86_64")]
pub fn elf_forever(calls: &[(u64, [u64; 6])]) -> Vec<u8> {
    const JUMP: usize = 5;
    let mut code = code(calls);
    let back = -i32::try_from(code.len() + JUMP).unwrap();
    // jmp to the first call
    code.push(0xe9);
    code.extend(back.to_le_bytes());
    file(code)
}

/// A program that makes the calls until the last one fails, `most` times at most. Then it writes
/// `\nfull 0 NN\n`, where NN is the errno in two digits (00: it never failed), and sleeps.
#[cfg(target_arch = "x86_64")]
pub fn elf_until(most: u32, calls: &[(u64, [u64; 6])], data: &[u8]) -> Vec<u8> {
    /// The length of the instructions before and behind the calls, in bytes.
    const AROUND: u64 = 5 + 13 + 5;
    const TELL: u64 = 52;
    let text_at = BASE + HEADERS + AROUND + CALL * calls.len() as u64 + TELL;
    let mut bytes = vec![0xbb];
    // mov ebx, most
    bytes.extend(most.to_le_bytes());
    let calls = code(calls);
    bytes.extend(&calls);
    // test rax, rax; js to the end of this; dec ebx; jnz to the calls; xor eax, eax
    bytes.extend([0x48, 0x85, 0xc0, 0x78, 10, 0xff, 0xcb, 0x0f, 0x85]);
    bytes.extend((-i32::try_from(calls.len() + 13).unwrap()).to_le_bytes());
    bytes.extend([0x31, 0xc0, 0x90, 0x90, 0x90]);
    let before = bytes.len();
    // neg eax; xor edx, edx; mov ecx, 10; div ecx; add the digits to the text
    bytes.extend([0xf7, 0xd8, 0x31, 0xd2, 0xb9, 10, 0, 0, 0, 0xf7, 0xf1]);
    let text = u32::try_from(text_at).unwrap();
    // mov esi, text; add [rsi + 8], al; add [rsi + 9], dl
    bytes.push(0xbe);
    bytes.extend(text.to_le_bytes());
    bytes.extend([0x00, 0x46, 8, 0x00, 0x56, 9]);
    // mov eax, SYS_write; mov edi, 1; mov edx, 11; syscall
    bytes.extend([0xb8, 1, 0, 0, 0, 0xbf, 1, 0, 0, 0, 0xba, 11, 0, 0, 0, 0x0f, 0x05]);
    // mov eax, SYS_pause; syscall; jmp to the pause; nop
    bytes.extend([0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7, 0x90, 0x90, 0x90, 0x90]);
    assert_eq!((bytes.len() - before) as u64, TELL);
    bytes.extend(b"\nfull 0 00\n");
    bytes.extend(data);
    file_of(bytes, 7)
}

/// The address of the data in a program of `elf_until` with so many calls.
#[cfg(target_arch = "x86_64")]
pub fn data_until(calls: u64) -> u64 {
    BASE + HEADERS + 23 + CALL * calls + 52 + 11
}

#[cfg(target_arch = "x86_64")]
fn code(calls: &[(u64, [u64; 6])]) -> Vec<u8> {
    let mut code = Vec::new();
    for (number, arguments) in calls {
        let mut load = |opcode: [u8; 2], value: u64| {
            code.extend(opcode);
            code.extend(value.to_le_bytes());
        };
        // movabs into rdi, rsi, rdx, r10, r8, r9, rax; for `RESULT`, mov from rax and a nop of seven bytes
        let registers = [[0x48, 0xbf], [0x48, 0xbe], [0x48, 0xba], [0x49, 0xba], [0x49, 0xb8], [0x49, 0xb9]];
        for (register, value) in registers.into_iter().zip(*arguments) {
            if value == RESULT {
                let [prefix, opcode] = register;
                load([prefix, 0x89], u64::from_le_bytes([opcode + 8, 0x0f, 0x1f, 0x80, 0, 0, 0, 0]));
            } else {
                load(register, value);
            }
        }
        load([0x48, 0xb8], *number);
        // syscall
        code.extend([0x0f, 0x05]);
    }
    code
}

/// The ELF file of some code, in readable and executable memory.
#[cfg(target_arch = "x86_64")]
fn file(code: Vec<u8>) -> Vec<u8> {
    file_of(code, 5)
}

/// The ELF file of some code, with the flags of its memory: 1 executable, 2 writable, 4 readable.
#[cfg(target_arch = "x86_64")]
fn file_of(code: Vec<u8>, flags: u32) -> Vec<u8> {
    let size = HEADERS + code.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    let long = |file: &mut Vec<u8>, value: u64| file.extend(value.to_le_bytes());
    // ET_EXEC, EM_X86_64, version, entry, program headers, no section headers, flags
    half(&mut file, 2);
    half(&mut file, 62);
    word(&mut file, 1);
    long(&mut file, BASE + HEADERS);
    long(&mut file, 64);
    long(&mut file, 0);
    word(&mut file, 0);
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut file, value);
    }
    // PT_LOAD: the whole file
    word(&mut file, 1);
    word(&mut file, flags);
    for value in [0, BASE, BASE, size, size, 0x1000] {
        long(&mut file, value);
    }
    file.extend(code);
    file
}
