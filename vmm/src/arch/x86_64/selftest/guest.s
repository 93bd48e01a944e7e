# The guest of the self-test (selftest.rs): what a Linux kernel whose own code runs in ring 3 relies on, one check after
# another, in the order in which such a kernel meets it.
#
# Linked into the VMM as data, copied to physical address LOAD and run there in long mode, seen at -2 GiB + LOAD. All
# pages are open to ring 3. `check` says what is tried next; the host reads the latest from the header when the guest
# ends, or does not.

.set KERNEL_CODE,   0x10                # as Linux numbers its segments; selftest.rs fills the table
.set USER_DATA,     0x28 | 3
.set USER_CODE,     0x30 | 3
.set TASK,          0x40

.set PORT_END,      0xf4                # AL: one of these
.set END_OK,        0
.set END_MISMATCH,  1
.set END_EXCEPTION, 2
.set PORT_ECHO,     0xf5                # reads as the complement of what was written

.set KERNEL_BASE,   0xffffffff80000000
.set LOAD,          0x10000
.set IDT,           KERNEL_BASE + 0x5000
.set WINDOW_ENTRY,  KERNEL_BASE + 0x3008    # second entry of the page directory; selftest.rs leaves it empty
.set WINDOW,        KERNEL_BASE + 0x200000  # what it maps: physical address 0 once more
.set APIC,          KERNEL_BASE + 0x400000

.set APIC_EOI,      APIC + 0xb0
.set APIC_SPURIOUS, APIC + 0xf0
.set APIC_LVT_TIMER, APIC + 0x320
.set APIC_COUNT,    APIC + 0x380
.set APIC_DIVIDE,   APIC + 0x3e0
.set TIMER_VECTOR,  0x30
.set TIMER_TICKS,   1000

.set PAGE_PRESENT_USER,          0x85   # and large
.set PAGE_PRESENT_WRITABLE_USER, 0x87
.set FAULT_READ,    4                   # by ring 3, of a page that is not there
.set FAULT_WRITE,   7                   # by ring 3, of a page that is read-only

.set RFLAGS_CF,     1
.set RFLAGS_IF,     0x200
.set CR4_BITS,      0x50600             # OSXSAVE, FSGSBASE, OSXMMEXCPT, OSFXSR
.set XCR0_KNOWN,    0xe7                # x87, SSE, AVX, AVX-512: what fits xsave_area
.set MSR_EFER,      0xc0000080
.set EFER_SCE,      1
.set MSR_STAR,      0xc0000081
.set MSR_LSTAR,     0xc0000082
.set MSR_SFMASK,    0xc0000084
.set MSR_NONE,      0x5e1f7e57
.set BRAND,         0x80000002          # CPUID leaf: 16 characters of the CPU's name
.set PATTERN,       0x5e1f7e5700c0ffee

.set SERVICE_RING,  0                   # EAX on return: CS of the service
.set SERVICE_END,   1                   # EDI: how
.set SERVICE_FLUSH_PAGE, 2              # RDI: address
.set SERVICE_FLUSH, 3
.set SERVICE_RDMSR, 4                   # ECX: register; EDI on return: 1 if there is none
.set SERVICE_HALT,  5                   # until the timer's interrupt

.pushsection .rodata.shoal_self_test, "a", @progbits
.code64
.balign 16
.global shoal_self_test_start
shoal_self_test_start:

# The header: `struct Header` in selftest.rs.
    .quad ring0_start - shoal_self_test_start
    .quad after_popcnt - shoal_self_test_start
    .quad stubs - shoal_self_test_start
    .quad ring0_stack_end - shoal_self_test_start
brand:        .fill 16, 1, 0            # what KVM was told that CPUID answers
check_name:   .long 0                   # where the latest check's name begins, from the start
syscall_code: .long 0                   # CS in which SYSCALL arrived
event_vector: .quad 0                   # the latest exception or interrupt
event_error:  .quad 0
event_rip:    .quad 0
event_cr2:    .quad 0

.macro check name
    movl $(name_\@ - shoal_self_test_start), check_name(%rip)
    jmp after_name_\@
name_\@: .asciz "\name"
after_name_\@:
.endm

.macro service number
    movl $\number, %eax
    int $4
.endm

.macro expect_interrupts_on
    pushfq
    testq $RFLAGS_IF, (%rsp)
    leaq 8(%rsp), %rsp
    jz mismatch
.endm

# ---------------------------------------------------------------- ring 0

# Its name is never shown: whether it works tells hardware and software KVM apart.
ring0_start:
    popcnt %eax, %eax
after_popcnt:

    check "CPUID in ring 0 answers what KVM_SET_CPUID2 gave"
    movl $BRAND, %eax
    cpuid
    cmpl %eax, brand(%rip)
    jne ring0_mismatch
    cmpl %ebx, brand + 4(%rip)
    jne ring0_mismatch
    cmpl %ecx, brand + 8(%rip)
    jne ring0_mismatch
    cmpl %edx, brand + 12(%rip)
    jne ring0_mismatch

    check "CR4 takes FSGSBASE and OSXSAVE, XCR0 what CPUID lists"
    movq %cr4, %rax
    orq $CR4_BITS, %rax
    movq %rax, %cr4
    movl $0xd, %eax
    xorl %ecx, %ecx
    cpuid
    andl $XCR0_KNOWN, %eax
    xorl %edx, %edx
    xorl %ecx, %ecx
    xsetbv

    check "WRMSR sets SYSCALL up"
    movl $MSR_EFER, %ecx
    rdmsr
    orl $EFER_SCE, %eax
    wrmsr
    movl $MSR_STAR, %ecx
    xorl %eax, %eax
    movl $(((USER_CODE - 16) << 16) | KERNEL_CODE), %edx
    wrmsr
    movl $MSR_LSTAR, %ecx
    leaq on_syscall(%rip), %rax
    movl $(KERNEL_BASE >> 32), %edx
    wrmsr
    movl $MSR_SFMASK, %ecx
    xorl %eax, %eax
    xorl %edx, %edx
    wrmsr

    check "LIDT and LTR"
    lidt idt_pointer(%rip)
    movl $TASK, %eax
    ltr %ax

    check "IRETQ from ring 0 to 64-bit code of ring 3 at -2 GiB, with interrupts on"
    pushq $USER_DATA
    leaq ring3_stack_end(%rip), %rax
    pushq %rax
    pushq $RFLAGS_IF | 2
    pushq $USER_CODE
    leaq ring3_start(%rip), %rax
    pushq %rax
    iretq

ring0_mismatch:
    movl $END_MISMATCH, %edi
end:
    movl %edi, %eax
    outb %al, $PORT_END
    jmp end

# One stub for each vector, as such a kernel has them: notes what the CPU has pushed and goes on in ring 3, with the
# interrupted flags and stack pointer. 64 bytes each.
.balign 64
stubs:
.set vector, 0
.rept TIMER_VECTOR + 1
    .balign 64
    .if vector == 4
    jmpq *(services - shoal_self_test_start + KERNEL_BASE + LOAD)(, %rax, 8)
    .else
    .if (vector == 8) || (vector == 10) || (vector == 11) || (vector == 12) || (vector == 13) || (vector == 14) || (vector == 17) || (vector == 21)
    popq event_error(%rip)
    .endif
    .if vector == 14
    pushq %rax
    movq %cr2, %rax
    movq %rax, event_cr2(%rip)
    popq %rax
    .endif
    movl $vector, event_vector(%rip)
    testb $3, 8(%rsp)
    jz ring0_event
    popq event_rip(%rip)
    .if vector == 14
    pushq $(on_page_fault - shoal_self_test_start + KERNEL_BASE + LOAD)
    .elseif vector == TIMER_VECTOR
    pushq $(on_timer - shoal_self_test_start + KERNEL_BASE + LOAD)
    .else
    pushq $(on_exception - shoal_self_test_start + KERNEL_BASE + LOAD)
    .endif
    iretq
    .endif
    .set vector, vector + 1
.endr

# What happens to ring 0 itself: the interrupt that ends HLT, and RDMSR of no register.
ring0_event:
    cmpl $TIMER_VECTOR, event_vector(%rip)
    jne 1f
    incl timer_count(%rip)
    movl $0, APIC_EOI
    iretq
1:  cmpl $13, event_vector(%rip)
    jne 2f
    cmpl $0, msr_may_fault(%rip)
    je 2f
    movq 24(%rsp), %rsp                 # the service's own frame
    movl $1, %edi
    iretq
2:  popq event_rip(%rip)
    movl $END_EXCEPTION, %edi
    jmp end

.balign 8
services:
    .quad service_ring - shoal_self_test_start + KERNEL_BASE + LOAD
    .quad end - shoal_self_test_start + KERNEL_BASE + LOAD
    .quad service_flush_page - shoal_self_test_start + KERNEL_BASE + LOAD
    .quad service_flush - shoal_self_test_start + KERNEL_BASE + LOAD
    .quad service_rdmsr - shoal_self_test_start + KERNEL_BASE + LOAD
    .quad service_halt - shoal_self_test_start + KERNEL_BASE + LOAD

service_ring:
    movl %cs, %eax
    iretq
service_flush_page:
    invlpg (%rdi)
    iretq
service_flush:
    movq %cr3, %rax
    movq %rax, %cr3
    iretq
service_rdmsr:
    xorl %edi, %edi
    movl $1, msr_may_fault(%rip)
    rdmsr
    iretq
service_halt:
    movl $TIMER_TICKS, APIC_COUNT
    sti
    hlt
    cli
    iretq

# ---------------------------------------------------------------- ring 3

ring3_start:
    movl %cs, %eax
    cmpl $USER_CODE, %eax
    jne mismatch
    expect_interrupts_on

    check "INT 4 to a service in ring 0 and back"
    movq %rsp, %rbx
    service SERVICE_RING
    cmpl $KERNEL_CODE, %eax
    jne mismatch
    cmpq %rsp, %rbx
    jne mismatch
    expect_interrupts_on

    check "IRETQ from ring 3 to ring 3"
    movq %rsp, %rbx
    leaq -64(%rsp), %rcx
    pushq $USER_DATA
    pushq %rcx
    pushq $RFLAGS_IF | RFLAGS_CF | 2
    pushq $USER_CODE
    leaq 1f(%rip), %rax
    pushq %rax
    clc
    iretq
1:  jnc mismatch
    cmpq %rsp, %rcx
    jne mismatch
    movq %rbx, %rsp
    expect_interrupts_on

    # The handler maps the page, and the access is made again.
    check "a page fault in ring 3: address, error code, and the page that its handler maps"
    leaq WINDOW - KERNEL_BASE + marker(%rip), %rsi
    movq %rsi, expected_cr2(%rip)
    movl $FAULT_READ, expected_error(%rip)
    movq $PAGE_PRESENT_USER, mapping(%rip)
    movq (%rsi), %rax
    cmpq %rax, marker(%rip)
    jne mismatch
    cmpl $1, fault_count(%rip)
    jne mismatch
    expect_interrupts_on

    check "a write to a read-only page faults in ring 3"
    movl $FAULT_WRITE, expected_error(%rip)
    movq $PAGE_PRESENT_WRITABLE_USER, mapping(%rip)
    incq (%rsi)
    cmpq %rax, marker(%rip)
    je mismatch
    cmpl $2, fault_count(%rip)
    jne mismatch

    check "INVLPG in ring 0 takes a mapping away that ring 3 has cleared"
    movl $FAULT_READ, expected_error(%rip)
    movq $0, WINDOW_ENTRY
    movq %rsi, %rdi
    service SERVICE_FLUSH_PAGE
    movq (%rsi), %rax
    cmpl $3, fault_count(%rip)
    jne mismatch

    check "a write to CR3 takes a mapping away that ring 3 has cleared"
    movq $0, WINDOW_ENTRY
    service SERVICE_FLUSH
    movq (%rsi), %rax
    cmpl $4, fault_count(%rip)
    jne mismatch

    check "SYSCALL arrives at LSTAR with RCX and R11, and interrupts stay on"
    movq %rsp, %rbp
    leaq 1f(%rip), %rdx
    stc
    pushfq
    popq %rbx
    syscall
1:  cmpq %rsp, %rbp
    jne mismatch
    movl %cs, %eax
    cmpl $USER_CODE, %eax
    jne mismatch
    cmpl $0, syscall_code(%rip)
    je mismatch
    expect_interrupts_on

    check "port I/O in ring 3, by the task's bitmap"
    movb $0x5a, %al
    outb %al, $PORT_ECHO
    inb $PORT_ECHO, %al
    cmpb $0xa5, %al
    jne mismatch

    check "RDMSR of no register is an exception in ring 0 that can be gone on from"
    movl $MSR_NONE, %ecx
    service SERVICE_RDMSR
    cmpl $1, %edi
    jne mismatch
    expect_interrupts_on

    check "an interrupt in ring 3, from a local APIC that ring 3 has set up"
    movl $0x1ff, APIC_SPURIOUS
    movl $0xb, APIC_DIVIDE
    movl $TIMER_VECTOR, APIC_LVT_TIMER
    movl $TIMER_TICKS, APIC_COUNT
1:  pause
    cmpl $1, timer_count(%rip)
    jb 1b
    expect_interrupts_on

    check "a second interrupt in ring 3"
    movl $TIMER_TICKS, APIC_COUNT
1:  pause
    cmpl $2, timer_count(%rip)
    jb 1b
    expect_interrupts_on

    check "HLT in ring 0 ends with an interrupt"
    service SERVICE_HALT
    cmpl $3, timer_count(%rip)
    jne mismatch
    expect_interrupts_on

    check "POPCNT in ring 3"
    movl $0x10101, %eax
    popcnt %eax, %eax
    cmpl $3, %eax
    jne mismatch

    check "CMPXCHG16B in ring 3"
    xorl %eax, %eax
    xorl %edx, %edx
    movl $7, %ebx
    movl $8, %ecx
    lock cmpxchg16b pair(%rip)
    jnz mismatch
    cmpq $7, pair(%rip)
    jne mismatch
    cmpq $8, pair + 8(%rip)
    jne mismatch

    check "XSAVE and XRSTOR in ring 3"
    movabsq $PATTERN, %rbx
    movq %rbx, %xmm0
    movl $-1, %eax
    movl $-1, %edx
    xsave64 xsave_area(%rip)
    pxor %xmm0, %xmm0
    xrstor64 xsave_area(%rip)
    movq %xmm0, %rax
    cmpq %rax, %rbx
    jne mismatch

    check "FS and GS base are set in ring 3, and kept over a service and an interrupt"
    movabsq $PATTERN, %rax
    movq %rax, pair(%rip)
    leaq pair(%rip), %rbx
    leaq -8(%rbx), %rcx
    wrfsbase %rbx
    wrgsbase %rcx
    service SERVICE_RING
    movl $TIMER_TICKS, APIC_COUNT
1:  pause
    cmpl $4, timer_count(%rip)
    jb 1b
    movabsq $PATTERN, %rax
    cmpq %fs:0, %rax
    jne mismatch
    cmpq %gs:8, %rax
    jne mismatch
    rdfsbase %rax
    cmpq %rax, %rbx
    jne mismatch
    rdgsbase %rax
    cmpq %rax, %rcx
    jne mismatch

    check "interrupts are still on in ring 3 at the end"
    expect_interrupts_on
    movl $END_OK, %edi
    service SERVICE_END

mismatch:
    movl $END_MISMATCH, %edi
    service SERVICE_END

# LSTAR. Such KVM arrives here in ring 3; hardware, and other software, in ring 0, from where it is the same way back.
# RDX: what RCX is to be; RBX: what R11 is to be.
on_syscall:
    movl %cs, %eax
    movl %eax, syscall_code(%rip)
    testb $3, %al
    jz 1f
    cmpq %rcx, %rdx
    jne mismatch
    cmpq %r11, %rbx
    jne mismatch
    expect_interrupts_on
    jmpq *%rcx
1:  movq %rsp, event_rsp(%rip)
    leaq ring0_stack_end(%rip), %rsp
    cmpq %rcx, %rdx
    jne ring0_mismatch
    cmpq %r11, %rbx
    jne ring0_mismatch
    pushq $USER_DATA
    pushq event_rsp(%rip)
    pushq %r11
    pushq $USER_CODE
    pushq %rcx
    iretq

# Events come here from their stubs with the interrupted registers, flags and stack. `event_frame` is what IRETQ takes.
.macro event_frame
    movq %rsp, event_rsp(%rip)
    pushq $USER_DATA
    pushq event_rsp(%rip)
    pushfq
    pushq $USER_CODE
    pushq event_rip(%rip)
.endm

on_page_fault:
    event_frame
    pushq %rax
    movq event_cr2(%rip), %rax
    cmpq %rax, expected_cr2(%rip)
    jne on_exception
    movl event_error(%rip), %eax
    cmpl %eax, expected_error(%rip)
    jne on_exception
    incl fault_count(%rip)
    cmpl $8, fault_count(%rip)          # the same fault for ever
    je on_exception
    movq mapping(%rip), %rax
    movq %rax, WINDOW_ENTRY
    popq %rax
    iretq

on_timer:
    event_frame
    incl timer_count(%rip)
    movl $0, APIC_EOI
    iretq

on_exception:
    movl $END_EXCEPTION, %edi
    service SERVICE_END

# ---------------------------------------------------------------- data

.balign 8
marker:         .quad PATTERN
expected_cr2:   .quad 0
mapping:        .quad 0                 # what on_page_fault puts into WINDOW_ENTRY
event_rsp:      .quad 0
expected_error: .long 0
fault_count:    .long 0
timer_count:    .long 0
msr_may_fault:  .long 0
idt_pointer:
    .word (TIMER_VECTOR + 1) * 16 - 1
    .quad IDT
.balign 64
xsave_area:     .fill 4096, 1, 0
.balign 16
pair:           .fill 16, 1, 0
    .fill 512, 1, 0
ring0_stack_end:
    .fill 512, 1, 0
ring3_stack_end:

.global shoal_self_test_end
shoal_self_test_end:
.popsection
